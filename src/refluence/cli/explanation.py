"""Fit, score, and write what every explaining command writes."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

import refluence as rf
from refluence.batches import Batches
from refluence.cli.method import Method
from refluence.cli.output_folder import OutputFolder
from refluence.cli.problem import Problem
from refluence.cli.rows import select_rows
from refluence.errors import DataError
from refluence.skipping import replaced

if TYPE_CHECKING:
    from refluence.evaluation.verification import Verification

_PACKAGES = ("refluence", "torch", "numpy", "scipy", "pandas", "zarr", "safetensors", "scikit-learn")
SUSPICIOUS = 50


@dataclass(frozen=True)
class Explanation:
    """A fitted influence with the scores of the chosen test rows, and their verification; `seconds` by stage."""

    problem: Problem
    rows: list[int]
    influence: rf.Influence
    scores: rf.Scores
    seconds: dict[str, float] = field(default_factory=dict)
    verification: Verification | None = None
    certificate: rf.Certificate | None = None


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time of this stage."""
    begin = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - begin, 3)


def explain(problem: Problem, method: Method, rows: list[int], save_fit: Path | None = None) -> Explanation:
    """Fit the influence to the train rows, keep the fit where asked, and score the given test rows."""
    seconds: dict[str, float] = {}
    with timed(seconds, "fit"):
        influence = method.fit(problem)
    if save_fit is not None:
        with timed(seconds, "save fit"):
            influence.save(save_fit)
    return _scored(problem, influence, rows, seconds)


def explain_again(problem: Problem, fit: Path, rows: list[int], damping: Any = None) -> Explanation:
    """Score the given test rows with a fit that was kept, at another damping where one is given.

    Raises:
        DataError: a fit on other train rows.
    """
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        influence = rf.Influence.load(fit, problem.task)
    train = replaced(Batches(problem.train, dtype=influence.settings.dtype, name="train"), influence.skipped)
    if train.checksum != influence.manifest()["train_fingerprint"]:
        raise DataError(f"the fit in {fit} was made on other train rows than those of {problem.title}")
    if damping is not None:
        influence = influence.at(damping)
    return _scored(problem, influence, rows, seconds)


def verified(explanation: Explanation, count: int, *, seed: int, progress: bool) -> Explanation:
    """The same with `count` train rows really removed and the changes set against the prediction."""
    from refluence.evaluation.verification import verify

    seconds = dict(explanation.seconds)
    test = select_rows(explanation.problem.test, explanation.rows)
    with timed(seconds, "verify"):
        found = verify(explanation.influence, explanation.scores, test, count, seed=seed, progress=progress)
    return dataclasses.replace(explanation, seconds=seconds, verification=found)


def certified(explanation: Explanation) -> Explanation:
    """The same with the error of the scores measured against exact ones."""
    seconds = dict(explanation.seconds)
    test = select_rows(explanation.problem.test, explanation.rows)
    with timed(seconds, "certify"):
        found = explanation.influence.certify(test)
    frame = found.frame.assign(test=explanation.rows)
    return dataclasses.replace(explanation, seconds=seconds, certificate=dataclasses.replace(found, frame=frame))


def _scored(problem: Problem, influence: rf.Influence, rows: list[int], seconds: dict[str, float]) -> Explanation:
    """The scores; their ids are rows of the whole test set."""
    with timed(seconds, "score"):
        scores = influence.score(select_rows(problem.test, rows))
    return Explanation(problem, rows, influence, dataclasses.replace(scores, test_ids=np.asarray(rows)), seconds)


def write(
    explanation: Explanation,
    folder: OutputFolder,
    *,
    command: str,
    options: dict[str, Any],
    top: int,
    report: bool,
    notes: Sequence[str] = (),
    extra: dict[str, Any] | None = None,
) -> None:
    """Write scores, top rows, report and manifest into a folder that was begun."""
    problem, scores, seconds = explanation.problem, explanation.scores, dict(explanation.seconds)
    with timed(seconds, "save"):
        scores.save(folder.scores)
        top_frame(scores, top).to_parquet(folder.top, index=False)
        if explanation.certificate is not None:
            explanation.certificate.frame.to_parquet(folder.certificate, index=False)
    if report:
        from refluence.report import write_report

        with timed(seconds, "report"):
            write_report(
                folder.report,
                explanation.influence,
                scores,
                problem.train,
                problem.test,
                presentation=problem.presentation,
                top=top,
                title=f"Influence report: {problem.title}",
                suspicious=SUSPICIOUS,
                verification=explanation.verification,
                notes=_notes(explanation, notes),
            )
    folder.finish(
        {
            "command": command,
            "options": options,
            "versions": versions(),
            "problem": describe(problem),
            "test_rows": explanation.rows,
            "influence": explanation.influence.manifest(),
            "plan": explanation.influence.plan.summary().splitlines(),
            "diagnostics": explanation.influence.diagnostics,
            "verification": _verification(explanation.verification),
            "certificate": None if explanation.certificate is None else explanation.certificate.manifest(),
            **(extra or {}),
            "timings_seconds": seconds,
        }
    )


def _notes(explanation: Explanation, notes: Sequence[str]) -> list[str]:
    """What the page says below the facts."""
    benchmark, certificate = explanation.problem.benchmark, explanation.certificate
    described = [] if benchmark is None else [benchmark.description]
    return [*described, *notes, *([] if certificate is None else [f"Certificate. {certificate.summary()}"])]


def _verification(found: Verification | None) -> dict[str, Any] | None:
    """A verification as it goes into the manifest."""
    if found is None:
        return None
    return {**found.manifest(), "checks": json.loads(found.frame.to_json(orient="records"))}


def top_frame(scores: rf.Scores, k: int) -> pd.DataFrame:
    """The k most helpful and k most harmful train rows of each test row, told apart by the column `direction`."""
    sides = [scores.top(k).assign(direction="helpful"), scores.bottom(k).assign(direction="harmful")]
    return pd.concat(sides, ignore_index=True)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers come from, with the number of threads."""
    found = {package: metadata.version(package) for package in _PACKAGES}
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), **found, "machine": machine}


def describe(problem: Problem) -> dict[str, Any]:
    """The problem as it goes into the manifest."""
    described: dict[str, Any] = {"title": problem.title, "task": problem.task.describe()}
    if problem.benchmark is not None:
        benchmark = problem.benchmark
        described |= {
            "description": benchmark.description,
            "recipe": dataclasses.asdict(benchmark.recipe),
            "accuracy": benchmark.accuracy,
            "train_loss": benchmark.train_loss,
            "trained_now": benchmark.trained_now,
            "flipped": benchmark.flipped.tolist(),
        }
    return described
