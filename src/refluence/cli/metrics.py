"""The tests that `refluence evaluate` makes: when each applies, and what it measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

import refluence as rf
from refluence.batches import Batches
from refluence.cli.problem import Problem
from refluence.cli.trial import NO_RECIPE, Trial, labels_of
from refluence.errors import DataError
from refluence.evaluation import plots
from refluence.evaluation.agreement import loo_agreement, predicted_changes
from refluence.evaluation.convex import leave_one_out
from refluence.evaluation.lds import lds
from refluence.evaluation.mislabel import mislabel
from refluence.evaluation.randomisation import randomisation
from refluence.evaluation.removal import brittleness, removal_curve
from refluence.evaluation.retrieval import class_retrieval, top_cardinality
from refluence.evaluation.tail_patch import tail_patch
from refluence.training import stream

REMOVED_SHARES = (0.02, 0.05, 0.1, 0.2)
BRITTLE_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
BRITTLE_TESTS = 8
RANDOM = "random"


@dataclass(frozen=True)
class Metric:
    """A test: `missing(problem)` says what it lacks, or None; `measure(trial)` gives tidy rows."""

    name: str
    title: str
    meaning: str
    missing: Callable[[Problem], str | None]
    measure: Callable[[Trial], pd.DataFrame]
    unasked: bool = True


def applicable(problem: Problem, asked: list[str] | None) -> tuple[list[Metric], dict[str, str]]:
    """The metrics to make, and those left out with the reason.

    Raises:
        DataError: a metric that was asked for by name does not apply.
    """
    chosen: list[Metric] = []
    skipped: dict[str, str] = {}
    for metric in METRICS.values():
        if asked is not None and metric.name not in asked:
            continue
        if asked is None and not metric.unasked:
            skipped[metric.name] = f"retrains models for every method: ask for it with --metrics {metric.name}"
            continue
        reason = metric.missing(problem)
        if reason is None:
            chosen.append(metric)
        elif asked is None:
            skipped[metric.name] = reason
        else:
            raise DataError(f"--metrics {metric.name} does not apply to {problem.title}: {reason}")
    return chosen, skipped


def _anything(problem: Problem) -> None:
    return None


def _needs_recipe(problem: Problem) -> str | None:
    return NO_RECIPE if problem.recipe is None else None


def _needs_optimum(problem: Problem) -> str | None:
    layers = [m for m in problem.task.model.modules() if next(m.parameters(recurse=False), None) is not None]
    if problem.task.loss not in CONVEX_LOSSES or len(layers) != 1 or not isinstance(layers[0], torch.nn.Linear):
        return (
            "exact leave-one-out is for convex problems, a model of one nn.Linear with a built-in loss; what removing "
            "single rows does to others is shown by refluence attribute --verify"
        )
    if problem.task.l2 <= 0:
        return "without l2 the training objective need not have a minimum: give --l2 1e-3 (in a Task: l2=1e-3)"
    return None


CONVEX_LOSSES = ("cross_entropy", "binary_cross_entropy", "mse")


def _needs_wrong_labels(problem: Problem) -> str | None:
    if problem.benchmark is None or len(problem.benchmark.flipped) == 0:
        return "no train label is known to be wrong: give --label-noise 0.1 with a built-in data set"
    return None


def _needs_labels(problem: Problem) -> str | None:
    if labels_of(problem.train) is None or labels_of(problem.test) is None:
        return "the rows have no integer label each"
    return None


def _needs_classes(problem: Problem) -> str | None:
    if problem.task.loss not in ("cross_entropy", "binary_cross_entropy"):
        return "only a classifier's prediction can flip"
    return _needs_recipe(problem)


def _lds(trial: Trial) -> pd.DataFrame:
    truth = trial.half_subsets().tests(trial.reported)
    return _each(trial, lambda _, s: lds(s, truth, measurement=trial.measurement, seed=trial.effort.seed).to_frame())


def _loo(trial: Trial) -> pd.DataFrame:
    n = Batches(trial.problem.train, name="train data").n
    generator = np.random.default_rng(stream(trial.effort.seed, "left out"))
    removed = sorted(generator.choice(n, min(trial.effort.removals, n - 1), replace=False).tolist())
    truth = leave_one_out(
        trial.problem.task,
        trial.problem.train,
        trial.test,
        removed,
        path=trial.folder / "leave-one-out",
        progress=trial.effort.progress,
    ).tests(trial.reported)

    def measured(_: str, scores: rf.Scores) -> pd.DataFrame:
        frame = loo_agreement(scores, truth, measurement=trial.measurement, seed=trial.effort.seed)
        pooled = frame[frame["scope"] == "pooled"]
        return pooled.assign(metric="loo_" + pooled["metric"])

    changes = truth.changes(trial.measurement).T
    first, scores = next(iter(trial.scores.items()))
    predicted = predicted_changes(scores.values.double().cpu(), truth)
    trial.pictures["loo"] = lambda: plots.plot_agreement(predicted, changes, label=first)
    return _each(trial, measured)


def _mislabel(trial: Trial) -> pd.DataFrame:
    benchmark = trial.problem.benchmark
    assert benchmark is not None
    suspicion = {name: influence.self_influence() for name, influence in trial.influences.items()}
    suspicion |= {name: trial.baselines[name].values[0] for name in ("loss", RANDOM) if name in trial.baselines}
    found = {name: mislabel(each, benchmark.flipped, seed=trial.effort.seed) for name, each in suspicion.items()}
    trial.pictures["mislabel"] = lambda: plots.plot_detection(found)
    return _tidy(trial, {name: detection.to_frame() for name, detection in found.items()})


def _removal(trial: Trial) -> pd.DataFrame:
    scores = _without_random(trial)
    sizes = _sizes(REMOVED_SHARES, scores)
    curve = removal_curve(
        scores,
        trial.without("removal"),
        sizes,
        measurement=trial.measurement,
        seed=trial.effort.seed,
    )
    trial.pictures["removal"] = lambda: plots.plot_removal(curve)
    names = [
        f"removal_{size}" if end == RANDOM else f"removal_{end}_{size}"
        for end, size in zip(curve["end"], curve["removed"], strict=True)
    ]
    frame = curve.rename(columns={"change": "value"}).assign(metric=names)
    return _tidy(trial, {str(name): part for name, part in frame.groupby("method", sort=False)})


def _brittleness(trial: Trial) -> pd.DataFrame:
    scores = _without_random(trial)
    tests = list(range(min(BRITTLE_TESTS, len(trial.reported))))
    found = brittleness(
        scores, trial.without("brittleness"), _sizes(BRITTLE_SHARES, scores), tests=tests, seed=trial.effort.seed
    )
    trial.pictures["brittleness"] = lambda: plots.plot_brittleness(found.curve)
    names = [f"brittleness_{size}" for size in found.curve["removed"]]
    frame = found.curve.rename(columns={"flipped": "value"}).assign(metric=names, confidence=0.95)
    return _tidy(trial, {str(name): part for name, part in frame.groupby("method", sort=False)})


def _tail_patch(trial: Trial) -> pd.DataFrame:
    problem, effort = trial.problem, trial.effort
    return _each(
        trial,
        lambda _, s: tail_patch(
            problem.task, s, problem.train, trial.reported_test, seed=effort.seed, progress=effort.progress
        ).to_frame(),
    )


def _retrieval(trial: Trial) -> pd.DataFrame:
    labels = trial.labels()
    assert labels is not None

    def measured(_: str, scores: rf.Scores) -> pd.DataFrame:
        own = class_retrieval(scores, *labels, seed=trial.effort.seed).to_frame()
        return pd.concat([own, top_cardinality(scores, min(10, scores.values.shape[1])).to_frame()])

    return _each(trial, measured)


def _randomisation(trial: Trial) -> pd.DataFrame:
    problem, effort = trial.problem, trial.effort
    frames = {
        name: randomisation(
            influence,
            problem.rows_for(influence.settings.execution),
            trial.reported_test,
            scores=trial.scores[name],
            build=problem.build,
            seed=effort.seed,
            progress=effort.progress,
        ).to_frame()
        for name, influence in trial.influences.items()
    }
    return _tidy(trial, frames)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "lds",
            "Linear datamodelling score",
            "Models are trained on random halves of the data. The scores of the rows in a half, summed, should rank "
            "these models as their measured losses do: the rank correlation, mean over test rows; 1 is perfect, 0 is "
            "chance.",
            _needs_recipe,
            _lds,
        ),
        Metric(
            "loo",
            "Leave-one-out",
            "Rows chosen at random are really left out and the convex model is refitted to its optimum. Predicted "
            "against measured change, over all pairs of a left-out row and a test row. The slope is of predicted on "
            "measured; r2 is about the line y = x.",
            _needs_optimum,
            _loo,
        ),
        Metric(
            "mislabel",
            "Wrong labels",
            "Train rows are inspected from the highest self-influence down (baselines: highest loss, any order). How "
            "early do the labels come that were made wrong on purpose?",
            _needs_wrong_labels,
            _mislabel,
        ),
        Metric(
            "removal",
            "Removal curves",
            "The most helpful or most harmful rows are removed and the model is retrained: the change of the "
            "measurement, mean over test rows, by the number removed.",
            _needs_recipe,
            _removal,
            unasked=False,
        ),
        Metric(
            "brittleness",
            "Brittleness",
            f"The share of the first {BRITTLE_TESTS} test rows whose prediction flips when the rows most helpful to it "
            "are removed and the model is retrained, by the number removed.",
            _needs_classes,
            _brittleness,
            unasked=False,
        ),
        Metric(
            "tail-patch",
            "Tail patch",
            "One more training step on a test row's ten most helpful train rows: how much its loss falls, mean over "
            "test rows.",
            _anything,
            _tail_patch,
        ),
        Metric(
            "retrieval",
            "Class retrieval",
            "The share of test rows whose most helpful train row is of their own class, and how varied the ten most "
            "helpful rows are over all test rows.",
            _needs_labels,
            _retrieval,
        ),
        Metric(
            "randomisation",
            "Randomisation check",
            "The rank correlation with the scores of an untrained model: near 0 where the scores come from what was "
            "learnt.",
            _anything,
            _randomisation,
        ),
    )
}


def _each(trial: Trial, measure: Callable[[str, rf.Scores], pd.DataFrame]) -> pd.DataFrame:
    return _tidy(trial, {name: measure(name, scores) for name, scores in trial.everything.items()})


def _tidy(trial: Trial, frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    parts = [
        frame.assign(method=name, kind="method" if name in trial.scores else "baseline")
        for name, frame in frames.items()
    ]
    table = pd.concat(parts, ignore_index=True)
    return table[["method", "kind", "metric", "value", "low", "high", "confidence"]]


def _without_random(trial: Trial) -> dict[str, rf.Scores]:
    """Removing random rows is a line of its own."""
    return {name: scores for name, scores in trial.everything.items() if name != RANDOM}


def _sizes(shares: tuple[float, ...], scores: Mapping[str, rf.Scores]) -> list[int]:
    n = next(iter(scores.values())).values.shape[1]
    return sorted({max(1, round(share * n)) for share in shares})
