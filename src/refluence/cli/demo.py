"""`refluence demo`: wrong labels among the digits, found by self-influence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from refluence.cli import explanation
from refluence.cli.method import Method
from refluence.cli.output_folder import OutputFolder
from refluence.cli.problem import Problem, problem_from
from refluence.cli.rows import misclassified
from refluence.cli.summary import print_explanation, print_files
from refluence.zoo import load_benchmark

NOISE = 0.05
SHARE = 0.05
EXPLAINED = 12
MOST_ERRORS = 6


@dataclass(frozen=True)
class Recovery:
    """How many of the flipped rows are among the `looked_at` with the highest self-influence, of n train rows."""

    flipped: int
    looked_at: int
    found: int
    n: int

    @property
    def by_chance(self) -> float:
        """How many a random choice of as many rows would find on average."""
        return self.flipped * self.looked_at / self.n

    @property
    def sentence(self) -> str:
        """The result in words."""
        return (
            f"{self.flipped} of the {self.n:,} train labels ({self.flipped / self.n:.0%}) were made wrong on purpose "
            f"before training. Among the {self.looked_at} rows with the highest self-influence "
            f"(the top {self.looked_at / self.n:.0%}) are {self.found} of them, {self.found / self.flipped:.0%}; "
            f"as many rows taken at random would hold {self.by_chance:.1f}."
        )


def run(out: Path, *, seed: int, top: int, retrain: bool, quiet: bool, options: dict[str, Any]) -> None:
    """Train, explain twelve test rows, rank suspicious labels, write all into `out` and print a summary."""
    console = Console(quiet=quiet)
    folder = OutputFolder(out)
    folder.check()
    benchmark = load_benchmark("digits", "mlp", seed=seed, label_noise=NOISE, progress=not quiet, retrain=retrain)
    problem = problem_from(benchmark, "digits mlp with wrong labels")
    folder.begin("demo")
    done = explanation.explain(problem, Method(seed=seed, progress=not quiet), demo_rows(problem))
    with explanation.timed(done.seconds, "self-influence"):
        recovery = recover(done.influence.self_influence(), benchmark.flipped)
    explanation.write(
        done,
        folder,
        command="demo",
        options=options,
        top=top,
        report=True,
        notes=[recovery.sentence],
        extra={
            "label_recovery": {
                "flipped": recovery.flipped,
                "looked_at": recovery.looked_at,
                "found": recovery.found,
                "by_chance": round(recovery.by_chance, 3),
            }
        },
    )
    print_explanation(console, done, explanation.top_frame(done.scores, 1))
    console.print(f"\n[bold]Wrong labels.[/bold] {recovery.sentence}\n", highlight=False)
    print_files(console, folder)


def demo_rows(problem: Problem) -> list[int]:
    """Twelve test rows: up to six misclassified ones first, then right ones spread over the classes."""
    wrong = misclassified(problem.task, problem.test)
    chosen = wrong[:MOST_ERRORS]
    labels = problem.test[1].tolist()
    right = [row for row in range(len(labels)) if row not in set(wrong)]
    count = dict.fromkeys(sorted(set(labels)), 0)
    for row in chosen:
        count[labels[row]] += 1
    while len(chosen) < EXPLAINED and right:
        row = min(right, key=lambda row: (count[labels[row]], labels[row], row))
        count[labels[row]] += 1
        right.remove(row)
        chosen.append(row)
    return chosen


def recover(self_influence: Tensor, flipped: Tensor) -> Recovery:
    """How many of the flipped rows are among the top 5 % by self-influence (n,)."""
    n = len(self_influence)
    looked_at = round(SHARE * n)
    suspicious = self_influence.detach().cpu().topk(looked_at).indices
    return Recovery(len(flipped), looked_at, int(torch.isin(flipped, suspicious).sum()), n)
