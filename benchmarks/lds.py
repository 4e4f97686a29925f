"""LDS of every solver, the gradient baselines and ensembles on a published setting, against models retrained on halves.

`python -m benchmarks.lds --dataset mnist --model mlp --subsets 100 --ensembles 10 50`

λ of each method is chosen on a random tenth of the test rows and never on the reported ones. Everything is kept in
`--out`: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import refluence as rf
from refluence import evaluation
from refluence.evaluation.tuning import tune_damping
from refluence.zoo import load_benchmark

CG = rf.solvers.ConjugateGradient(rtol=1e-2)
SMALL = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
MIDDLE = (3e-4, 1e-3, 3e-3, 1e-2)
LARGE = (1e-2, 3e-2, 6e-2, 1e-1, 3e-1, 1.0)


@dataclass(frozen=True)
class Method:
    """A way of scoring; `grid`: the dampings to choose from; `most`: how many models it is averaged over at most."""

    name: str
    curvature: str
    solver: Any
    grid: tuple[float, ...]
    most: int | None = None


def methods(model: str) -> list[Method]:
    """The solvers that end within minutes (LiSSA does not), with dampings where the model's best is."""
    linear = model in ("lr", "softmax")
    exact, spread = (LARGE, LARGE) if linear else (MIDDLE, SMALL)
    fisher = (1e-3, *LARGE) if linear else SMALL
    return [
        Method("CG", "ggn", CG, exact),
        Method("Arnoldi, rank 64", "ggn", rf.solvers.Arnoldi(64), exact),
        Method("Nyström, rank 512", "ggn", rf.solvers.Nystroem(512), exact),
        Method("SJLT, m = 4096", "ggn", rf.solvers.Sketched(rf.sketches.SJLT(4096)), exact),
        Method("EK-FAC", "ggn", rf.solvers.Ekfac(), spread),
        Method("K-FAC", "ggn", rf.solvers.Kfac(), spread),
        Method("EK-FAC", "mc_fisher", rf.solvers.Ekfac(), spread),
        Method("Gram (exact)", "fisher", rf.solvers.Gram(), fisher),
        Method("SJLT, m = 4096", "fisher", rf.solvers.Sketched(rf.sketches.SJLT(4096)), fisher),
        Method("harmonic mean (DataInf)", "fisher", rf.solvers.HarmonicMean(), (*fisher, 10.0)),
    ]


def ensemble_methods(model: str) -> list[Method]:
    """The methods that are cheap enough to be averaged over many models."""
    if model in ("lr", "softmax"):
        return [Method("CG", "ggn", CG, LARGE[1:4])]
    return [
        Method("Gram (exact)", "fisher", rf.solvers.Gram(), SMALL[:2]),
        Method("CG", "ggn", CG, MIDDLE[:1], most=10),
    ]


class Table:
    """Finished rows of the table, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, name: str, make: Callable[[], dict[str, Any]]) -> None:
        """Make a row unless it is there, and print it."""
        if name not in self.rows:
            begin = time.perf_counter()
            self.rows[name] = make() | {"seconds": time.perf_counter() - begin}
        self.path.write_text(json.dumps(self.rows, indent=1))
        row = self.rows[name]
        damping = "" if row.get("damping") is None else f"{row['damping']:.2g}"
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        averaged = "" if row.get("averaged") is None else f"{row['averaged']:.3f}"
        print(f"| {name} | {damping} | {row['lds']:.3f} | {interval} | {averaged} | {row['seconds']:.0f} |", flush=True)


def first_seed(truth: evaluation.GroundTruth) -> evaluation.GroundTruth:
    """The ground truth of one model a subset, as published."""
    return dataclasses.replace(truth, measurements={k: v[:, :1] for k, v in truth.measurements.items()})


def reported(scores: Any, truth: evaluation.GroundTruth, rows: Sequence[int]) -> dict[str, Any]:
    """LDS on the reported rows with one model a subset, and against the mean over the seeds."""
    one = evaluation.lds(scores, first_seed(truth).tests(rows))
    found: dict[str, Any] = {"lds": one.value, "low": one.low, "high": one.high}
    if next(iter(truth.measurements.values())).shape[1] > 1:
        found["averaged"] = evaluation.lds(scores, truth.tests(rows)).value
    return found


def single(method: Method, task: rf.Task, train: Any, test: Any, truth: evaluation.GroundTruth) -> dict[str, Any]:
    """The method on one model, its damping chosen on the held-out tenth."""
    influence = rf.Influence(task, method.curvature, method.solver, method.grid[0]).fit(train)
    tuned = tune_damping(influence, test, first_seed(truth), method.grid)
    found = reported(tuned.scores, truth, tuned.reported_rows)
    return found | {"damping": tuned.damping, "at_edge": tuned.at_edge, "chosen_rows": tuned.chosen_rows}


def ensemble(
    method: Method,
    models: Iterator[rf.Task],
    train: Any,
    test: Any,
    truth: evaluation.GroundTruth,
    sizes: Sequence[int],
    held_out: list[int],
) -> dict[int, dict[str, Any]]:
    """Scores averaged over models, their common damping chosen on the held-out tenth, for several numbers of models."""
    sums: dict[float, torch.Tensor] = {}
    found = {}
    rest = sorted(set(range(truth.n_test)) - set(held_out))
    one = first_seed(truth)
    begin = time.perf_counter()
    for count, task in enumerate(models, start=1):
        fitted = rf.Influence(task, method.curvature, method.solver, method.grid[0], progress=False).fit(train)
        for damping in method.grid:
            values = fitted.at(damping).score(test).values.double()
            sums[damping] = sums[damping] + values if damping in sums else values
        print(f"  model {count}", end="\r", flush=True)
        if count in sizes:
            best = max(sums, key=lambda d: evaluation.lds(sums[d][held_out], one.tests(held_out), resamples=2).value)
            found[count] = reported(sums[best][rest], truth, rest) | {
                "damping": best,
                "seconds": time.perf_counter() - begin,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--model", default="lr")
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2, help="models a subset; the first is the published ground truth")
    parser.add_argument("--ensembles", type=int, nargs="*", default=[10])
    parser.add_argument("--n-train", type=int)
    parser.add_argument("--n-test", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/lds"))
    arguments = parser.parse_args()
    benchmark = load_benchmark(
        arguments.dataset,
        arguments.model,
        n_train=arguments.n_train,
        n_test=arguments.n_test,
        epochs=arguments.epochs,
    )
    folder = arguments.out / f"{arguments.dataset}-{arguments.model}"
    folder.mkdir(parents=True, exist_ok=True)
    train, test, recipe = benchmark.train, benchmark.test, benchmark.recipe
    plain = benchmark.task
    halves = arguments.subsets
    truth = evaluation.retrain(plain, train, test, halves, recipe, seeds=arguments.seeds, path=folder / "halves")
    print(benchmark.description)
    print(f"{truth.n_subsets} random halves, {arguments.seeds} models each, {truth.n_test} test rows")
    table = Table(folder / "table.json")
    if arguments.seeds > 1:
        losses = truth.measurements["loss"]
        other = evaluation.GroundTruth(truth.masks, {"loss": losses[:, 1:2]})
        agree = torch.stack([spearman(losses[:, 0, i], other.values()[:, i]) for i in range(truth.n_test)])
        print(f"two seeds of the same subsets agree to {float(agree.nanmean()):.3f} (mean rank correlation)")
    print("| method | λ | LDS | 95 % interval | seeds averaged | s |\n| --- | --- | --- | --- | --- | --- |")
    # The loss is a falling function of the margin, so both have the same ranks; the margin's gradient does not vanish
    # in float32 where a test is classified with certainty.
    task = dataclasses.replace(plain, measurement="margin")
    for method in methods(arguments.model):
        name = f"{method.curvature} {method.name}"
        table.add(name, lambda method=method: single(method, task, train, test, truth))
    held_out = next(row["chosen_rows"] for row in table.rows.values() if "chosen_rows" in row)
    rest = sorted(set(range(truth.n_test)) - set(held_out))
    for name, scores in evaluation.baseline_scores(task, train, test).items():
        table.add(name, lambda scores=scores: reported(scores.values[rest], truth, rest))
    if arguments.ensembles:
        sizes = sorted(arguments.ensembles)
        masks = torch.ones(1, truth.n_train, dtype=torch.bool)
        whole = folder / "whole"
        evaluation.retrain(
            plain, train, test, masks, recipe, seeds=sizes[-1], seed=1_000_000, keep_models=True, path=whole
        )
        models = evaluation.load_models(whole, plain)
        for method in ensemble_methods(arguments.model):
            within = [size for size in sizes if method.most is None or size <= method.most]
            names = {size: f"{method.curvature} {method.name}, mean of {size} models" for size in within}
            if not all(name in table.rows for name in names.values()):
                tasks = (dataclasses.replace(task, model=model) for model in models[: within[-1]])
                found = ensemble(method, tasks, train, test, truth, within, held_out)
                table.rows |= {names[size]: row for size, row in found.items()}
            for name in names.values():
                table.add(name, dict)


def spearman(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return torch.corrcoef(ranks)[0, 1]


if __name__ == "__main__":
    main()
