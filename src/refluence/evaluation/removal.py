"""Removal and brittleness curves: the model is really retrained without the examples that a method names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from refluence.errors import DataError
from refluence.evaluation.bootstrap import RESAMPLES, mean_estimate, percentile_interval, resample_counts
from refluence.evaluation.ground_truth import GroundTruth
from refluence.scores import Scores
from refluence.training import stream

Retrainer = Callable[[Bool[Tensor, "m n"]], GroundTruth]
"""Trains on each mask and measures the test examples, such as
`lambda masks: rf.evaluation.retrain(task, train, test, masks, recipe, seeds=3)`."""

Methods = Scores | Tensor | Mapping[str, Scores | Tensor]


def removal_curve(
    methods: Methods,
    retrain: Retrainer,
    sizes: Sequence[int],
    *,
    tests: str = "sum",
    random: int = 3,
    measurement: str = "loss",
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean change of the measurement over the tests after retraining without the k highest or lowest train examples.

    Removing helpful examples should raise the measurement more than removing random ones, removing harmful ones lower
    it. All models are trained in one call of `retrain`. The intervals resample the tests, the seeds and the draws of
    random examples; with one seed the noise of training is not in them, and with two or three they are too short where
    it is most of the noise.

    Args:
        methods: name → `rf.Scores` or (n_test, n_train), positive = helpful; one alone is called "scores".
        retrain: masks → ground truth on the same test rows, with all seeds.
        sizes: numbers k of removed examples, ascending.
        tests: "sum": rank the train examples by their scores summed over the tests, one removal for all; "each": by
            each test's own scores, with a model for each test, on which only that test is measured.
        random: draws of random removals of each size; 0 for none.
        measurement: of the ground truth.
        resamples, confidence, seed: of the bootstrap; the seed also of random removals and of the order of ties.

    Returns:
        Rows of method ("random" too), end ("helpful", "harmful", "random"), removed, change, low, high, confidence.

    Raises:
        DataError: sizes outside 1…n−1, scores of different shapes or with NaN, or a ground truth of another shape.
    """
    values = _matrices(methods)
    k, n = next(iter(values.values())).shape
    sizes = _checked_sizes(sizes, n)
    if tests not in ("sum", "each"):
        raise DataError(f'tests must be "sum" or "each", not {tests!r}')
    removals = _Removals(n)
    cells: list[tuple[str, str, int, list[list[int]]]] = []
    for name, matrix in values.items():
        ranking = _ranking(matrix.sum(dim=0, keepdim=True) if tests == "sum" else matrix, seed)
        for end, ordered in (("helpful", ranking), ("harmful", ranking.flip(1))):
            for size in sizes:
                # rows[i] are the models that test i is measured on
                rows = [[removals.add(row[:size])] for row in ordered]
                cells.append((name, end, size, rows * k if tests == "sum" else rows))
    generator = np.random.default_rng(stream(seed, "random removals"))
    for size in sizes if random else ():
        drawn = [removals.add(torch.from_numpy(generator.choice(n, size, replace=False))) for _ in range(random)]
        cells.append(("random", "random", size, [drawn] * k))
    measured = _measured(removals, retrain, measurement, k)
    table = []
    for name, end, size, models in cells:
        samples = torch.stack([measured[row, :, i].reshape(-1) for i, row in enumerate(models)], dim=1)
        change, low, high = _mean_change(samples, measured[0], resamples, confidence, seed)
        table.append(
            {
                "method": name,
                "end": end,
                "removed": size,
                "change": change,
                "low": low,
                "high": high,
                "confidence": confidence,
            }
        )
    return pd.DataFrame(table)


@dataclass(frozen=True, eq=False)
class Brittleness:
    """How few removals change predictions.

    Attributes:
        examples: rows method, test, removed (the fewest of the sizes tried that flip the prediction; NaN where the
            largest does not).
        curve: rows method, removed, flipped (the share of the tests flipped by so many or fewer), low, high.
    """

    examples: pd.DataFrame = field(repr=False)
    curve: pd.DataFrame = field(repr=False)


def brittleness(
    methods: Methods,
    retrain: Retrainer,
    sizes: Sequence[int],
    *,
    tests: Sequence[int] | None = None,
    random: bool = True,
    measurement: str = "error",
    threshold: float = 0.5,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Brittleness:
    """The fewest removed helpful examples, of the sizes given, after which retraining mispredicts the test example.

    A prediction is flipped where the mean of the measurement over seeds is above the threshold: with "error" where most
    seeds mispredict. The size is found by bisection, which takes it that removing more flips too; all tests and methods
    are retrained together, in about log₂(sizes) + 2 calls of `retrain`. Tests that are mispredicted with all the data
    are left out, with a warning.

    Source: Ilyas et al. 2022 (datamodels); Park et al. 2023 (TRAK).

    Args:
        methods: name → `rf.Scores` or (n_test, n_train), positive = helpful; one alone is called "scores".
        retrain: masks → ground truth on the same test rows, with all seeds.
        sizes: numbers of removed examples to choose from, ascending.
        tests: rows to try; None: all. Each costs some models.
        random: also remove random examples, as the method "random".
        measurement: of the ground truth; "margin" with threshold 0 says "error" where there are two classes.
        threshold: above which a prediction counts as flipped.
        resamples, confidence, seed: of the bootstrap over tests; the seed also of random removals.

    Raises:
        DataError: as `removal_curve`; no test example that is predicted right.
    """
    values = _matrices(methods)
    k, n = next(iter(values.values())).shape
    sizes = _checked_sizes(sizes, n)
    if random:
        generator = np.random.default_rng(stream(seed, "random brittleness"))
        values["random"] = torch.from_numpy(generator.standard_normal((k, n)))
    whole = _measured(_Removals(n), retrain, measurement, k)[0].mean(dim=0)
    asked = list(range(k)) if tests is None else [int(row) for row in tests]
    right = [row for row in asked if not whole[row] > threshold]
    if not right:
        raise DataError(f"none of the {len(asked)} test examples is predicted right by the models trained on all data")
    if len(right) < len(asked):
        warnings.warn(
            f"{len(asked) - len(right)} of {len(asked)} test examples are mispredicted with all the data: left out",
            stacklevel=2,
        )
    rankings = {name: _ranking(matrix, seed) for name, matrix in values.items()}
    # The size of number `flips` flips the prediction, that of number `holds` does not.
    state = {(name, row): (-1, len(sizes)) for name in rankings for row in right}
    trial = dict.fromkeys(state, len(sizes) - 1)
    while trial:
        removals = _Removals(n)
        models = {(m, row): removals.add(rankings[m][row][: sizes[at]]) for (m, row), at in trial.items()}
        measured = _measured(removals, retrain, measurement, k)
        for (m, row), at in trial.items():
            holds, flips = state[m, row]
            flipped = bool(measured[models[m, row], :, row].mean() > threshold)
            state[m, row] = (holds, at) if flipped else (at, flips)
        trial = {key: (holds + flips) // 2 for key, (holds, flips) in state.items() if flips - holds > 1}
    found = [
        {"method": name, "test": row, "removed": float(sizes[flips]) if flips < len(sizes) else np.nan}
        for (name, row), (_, flips) in state.items()
    ]
    examples = pd.DataFrame(found)
    curve = []
    for name, part in examples.groupby("method", sort=False):
        for size in sizes:
            flipped_share = torch.from_numpy((part["removed"] <= size).to_numpy(dtype=np.float64))
            e = mean_estimate("flipped", flipped_share, resamples=resamples, confidence=confidence, seed=seed)
            curve.append({"method": name, "removed": size, "flipped": e.value, "low": e.low, "high": e.high})
    return Brittleness(examples, pd.DataFrame(curve))


class _Removals:
    """Different sets of removed examples; number 0 removes none."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._numbers: dict[bytes, int] = {}
        self._masks: list[Tensor] = []
        self.add(torch.empty(0, dtype=torch.int64))

    def add(self, rows: Int64[Tensor, " k"]) -> int:
        mask = torch.ones(self.n, dtype=torch.bool)
        mask[rows] = False
        key = mask.numpy().tobytes()
        if key not in self._numbers:
            self._numbers[key] = len(self._masks)
            self._masks.append(mask)
        return self._numbers[key]

    @property
    def masks(self) -> Bool[Tensor, "m n"]:
        return torch.stack(self._masks)


def _measured(removals: _Removals, retrain: Retrainer, measurement: str, k: int) -> Float64[Tensor, "m s k"]:
    truth = retrain(removals.masks)
    if not torch.equal(truth.masks, removals.masks) or truth.n_test != k:
        raise DataError(
            f"retrain gave a ground truth of {truth.n_subsets} subsets and {truth.n_test} tests; it must train on the "
            f"{len(removals.masks)} masks it is given, in their order, and measure the {k} test rows of the scores"
        )
    if measurement not in truth.measurements:
        raise DataError(f"no measurement {measurement!r} was taken: use one of {', '.join(truth.measurements)}")
    return truth.measurements[measurement]


def _mean_change(
    samples: Float64[Tensor, "s k"], whole: Float64[Tensor, "b k"], resamples: int, confidence: float, seed: int
) -> tuple[float, float, float]:
    """mean(samples) − mean(whole), and its interval over tests, and over the models of either."""
    k = samples.shape[1]
    tests = resample_counts(k, resamples, seed, "tests") / k
    draws = torch.zeros(resamples, dtype=torch.float64)
    for sign, part, purpose in ((1, samples, "models"), (-1, whole, "models of all data")):
        models = resample_counts(len(part), resamples, seed, purpose) / len(part)
        draws += sign * ((models @ part) * tests).sum(dim=1)
    low, high = percentile_interval(draws, confidence)
    return float(samples.mean() - whole.mean()), float(low), float(high)


def _matrices(methods: Methods) -> dict[str, Float64[Tensor, "k n"]]:
    named = dict(methods) if isinstance(methods, Mapping) else {"scores": methods}
    if not named:
        raise DataError("no method was given")
    values = {
        name: (each.values if isinstance(each, Scores) else each).detach().cpu().double()
        for name, each in named.items()
    }
    for name, matrix in values.items():
        if not bool(torch.isfinite(matrix).all()):
            raise DataError(f"the scores {name!r} hold NaN or Inf, so that they rank nothing")
    if len({tuple(matrix.shape) for matrix in values.values()}) > 1:
        raise DataError(f"the scores have different shapes: { {name: tuple(v.shape) for name, v in values.items()} }")
    return values


def _checked_sizes(sizes: Sequence[int], n: int) -> list[int]:
    checked = sorted({int(size) for size in sizes})
    if not checked or checked[0] < 1 or checked[-1] >= n:
        raise DataError(f"sizes must be numbers of removed examples from 1 to {n - 1}, not {list(sizes)}")
    return checked


def _ranking(values: Float64[Tensor, "k n"], seed: int) -> Int64[Tensor, "k n"]:
    """Train rows of each test, the most helpful first; ties in a random order."""
    shuffled = torch.from_numpy(np.random.default_rng(stream(seed, "ties")).permutation(values.shape[1]))
    return shuffled[values[:, shuffled].argsort(dim=1, descending=True, stable=True)]
