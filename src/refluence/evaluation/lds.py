"""The linear datamodeling score: do summed scores order retrained models as their losses do?"""

from __future__ import annotations

import warnings
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.errors import DataError
from refluence.evaluation.bootstrap import (
    RESAMPLES,
    correlation_interval,
    percentile_interval,
    resample_counts,
    weighted_means,
)
from refluence.evaluation.correlation import spearman_columns
from refluence.evaluation.estimate import Estimate
from refluence.evaluation.ground_truth import GroundTruth
from refluence.scores import Scores

ROUNDING = 1e-13


def lds(
    scores: Scores | Tensor,
    ground_truth: GroundTruth,
    *,
    measurement: str = "loss",
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Mean over tests of Spearman_S(Σ_{j∈S} τ_ij, −f_i(θ_S)), the linear datamodeling score; 1 is perfect.

    S runs over the subsets of the ground truth, f_i(θ_S) is the measurement of test i by the models trained on S. Ties
    get their mean rank. Tests on which either side is constant have no correlation: they are left out, with a warning,
    and are NaN in `details`. The interval resamples tests and subsets, both (the pigeonhole bootstrap). It is
    for this number of subsets: with few the mean itself lies a little below that of very many.

    Source: Park et al. 2023 (TRAK), definition 2.3; the bootstrap: Owen 2007.

    Args:
        scores: `rf.Scores` or (n_test, n_train), positive = helpful.
        ground_truth: models retrained on subsets, as `retrain` gives.
        measurement: which of its measurements.
        resamples: of the bootstrap.
        confidence: of the interval.
        seed: of the bootstrap; the same seed draws the same subsets and tests for every method.

    Returns:
        The estimate; `details` has one row a test: test, correlation.

    Raises:
        DataError: scores of other shape than the ground truth, NaN, fewer than 3 subsets, or no such measurement.
    """
    values = score_matrix(scores, ground_truth)
    points, draws, counts = _correlations(values, ground_truth, measurement, resamples, seed)
    details = pd.DataFrame({"test": row_ids(scores, len(points)), "correlation": points.numpy()})
    if left_out := int(points.isnan().sum()):
        warnings.warn(
            f"{left_out} of {len(points)} test examples have constant scores or constant measurements, and so no rank "
            "correlation: they are left out of the LDS",
            stacklevel=2,
        )
    value = float(points.nanmean())
    low, high = correlation_interval(value, weighted_means(draws, counts), confidence)
    return Estimate("lds", value, low, high, confidence, details)


def lds_difference(
    scores: Scores | Tensor,
    reference: Scores | Tensor,
    ground_truth: GroundTruth,
    *,
    measurement: str = "loss",
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """LDS of `scores` minus LDS of `reference` over the tests where both have one, on the same resamples.

    Two methods share the tests, the subsets and their noise, so this interval is far shorter than the two intervals
    suggest: it is the one that says whether a method is better.

    Raises:
        DataError: as `lds`.
    """
    pairs = [
        _correlations(score_matrix(each, ground_truth), ground_truth, measurement, resamples, seed)
        for each in (scores, reference)
    ]
    points, draws = pairs[0][0] - pairs[1][0], pairs[0][1] - pairs[1][1]
    value, means = float(points.nanmean()), weighted_means(draws, pairs[0][2])
    low, high = percentile_interval(means - means.nanmean() + value, confidence)
    details = pd.DataFrame({"test": row_ids(scores, len(points)), "difference": points.numpy()})
    return Estimate("lds difference", value, float(low), float(high), confidence, details)


def subset_sums(values: Float64[Tensor, "k n"], ground_truth: GroundTruth) -> Float64[Tensor, "m k"]:
    """Σ_{j∈S} τ_ij of each subset; exactly constant where it is so up to rounding."""
    sums = ground_truth.masks.double() @ values.T
    spread = sums.max(dim=0).values - sums.min(dim=0).values
    return torch.where(spread > ROUNDING * values.abs().sum(dim=1), sums, sums[:1])


def score_matrix(scores: Scores | Tensor, ground_truth: GroundTruth) -> Float64[Tensor, "k n"]:
    """The values of scores in float64, checked against a ground truth.

    Raises:
        DataError: another shape, or NaN.
    """
    values = (scores.values if isinstance(scores, Scores) else torch.as_tensor(scores)).detach().cpu().double()
    expected = (ground_truth.n_test, ground_truth.n_train)
    if tuple(values.shape) != expected:
        raise DataError(
            f"the scores have shape {tuple(values.shape)}, the ground truth is of {expected[0]} test and {expected[1]} "
            "train examples: give scores (n_test, n_train) of the same rows, not summed by group"
        )
    if not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values)).any(dim=1).nonzero()[0])
        raise DataError(f"the scores of test row {row} hold NaN or Inf")
    return values


def row_ids(scores: Any, k: int) -> Any:
    """The ids of the test rows, where the scores have any."""
    return scores.test_ids if isinstance(scores, Scores) else range(k)


def _correlations(
    values: Float64[Tensor, "k n"], ground_truth: GroundTruth, measurement: str, resamples: int, seed: int
) -> tuple[Float64[Tensor, " k"], Float64[Tensor, "r k"], Float64[Tensor, "r k"]]:
    """The correlation of each test, the same in each resample of the subsets, and how often the test is drawn there."""
    m, k = ground_truth.n_subsets, ground_truth.n_test
    if m < 3:
        raise DataError(f"the ground truth has {m} subsets: a rank correlation over subsets needs 3 at the least")
    predicted, measured = subset_sums(values, ground_truth), -ground_truth.values(measurement)
    diverged = measured.isnan().any(dim=1).nonzero()
    if len(diverged):
        raise DataError(
            f"the models of {len(diverged)} of {m} subsets measure NaN, the first of subset {int(diverged[0])}: train "
            "with a smaller step, or leave these subsets out"
        )
    points = spearman_columns(predicted, measured, torch.ones(m, 1, dtype=torch.float64))[0]
    subsets = resample_counts(m, resamples, seed, "subsets").T.contiguous()
    return points, spearman_columns(predicted, measured, subsets), resample_counts(k, resamples, seed, "tests")
