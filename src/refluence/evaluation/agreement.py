"""Predicted against measured changes: correlation, scale and error, each with an interval."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from jaxtyping import Float64
from numpy.typing import ArrayLike
from torch import Tensor

from refluence.errors import DataError
from refluence.evaluation.bootstrap import (
    RESAMPLES,
    correlation_interval,
    percentile_interval,
    resample_counts,
    weighted_means,
)
from refluence.evaluation.correlation import spearman
from refluence.evaluation.ground_truth import GroundTruth
from refluence.evaluation.lds import row_ids, score_matrix
from refluence.scores import Scores

METRICS = ("pearson", "spearman", "slope", "r2", "within_sign", "rmse_over_sd")
CORRELATIONS = ("pearson", "spearman", "within_sign")
FEWEST_OF_A_SIGN = 3
ROUNDING = 1e-24
"""A variance below this share of the mean square is that of a constant."""
RESAMPLED_ROUNDING = 1e-12
"""The same of a resample, whose variance is a difference of means."""
CHUNK_NUMBERS = 1 << 22

Draws = dict[str, Tensor]


def agreement(
    predicted: Tensor | ArrayLike,
    measured: Tensor | ArrayLike,
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """How well predicted changes p agree with measured ones a, over all pairs of a test and a removal.

    - pearson, spearman (ties averaged): the correlation and the rank correlation.
    - slope: of the least-squares line p ≈ slope·a + intercept; 1 is the right scale, below 1 the predictions are too
      small.
    - r2: 1 − Σ(a − p)² / Σ(a − ā)², about the line p = a: the only one of these that scale and offset both lower.
    - within_sign: the mean of the Pearson correlations of the pairs with p > 0 and of those with p < 0. Where removals
      are picked by the size of p there are two clusters, and the signs alone give a Pearson correlation of 0.8.
    - rmse_over_sd: √mean(p − a)² over the standard deviation of a.

    A metric that its pairs do not define (constant values, fewer than three of a sign) is NaN. The intervals resample
    the tests and the removals, both.

    Args:
        predicted, measured: (k, m) for k tests and m removals, or (m,) for one test.
        resamples, confidence, seed: of the bootstrap.

    Returns:
        One row a metric: metric, value, low, high, confidence, n (pairs).

    Raises:
        DataError: different shapes, NaN, or fewer than 3 pairs.
    """
    p, a = _checked(predicted, measured)
    points, draws = _all_pairs(p, a, resamples, seed)
    return _frame(points, draws, confidence, p.numel())


def loo_agreement(
    scores: Scores | Tensor,
    ground_truth: GroundTruth,
    *,
    measurement: str = "loss",
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """`agreement` of predicted changes Σ_{j left out} τ_ij / n with the measured changes of leaving examples out.

    Returns:
        The rows of `agreement` with a column "scope": "pooled" (all pairs), "mean" (the mean over tests of each test's
        own value, as published leave-one-out correlations are) and "test", where "test" has the test's id.

    Raises:
        DataError: as `agreement`; scores of another shape; a ground truth without models trained on all examples.
    """
    values = score_matrix(scores, ground_truth)
    p, a = _checked(predicted_changes(values, ground_truth), ground_truth.changes(measurement).T)
    points, draws = _all_pairs(p, a, resamples, seed)
    frames = [_frame(points, draws, confidence, p.numel()).assign(scope="pooled")]
    removals = resample_counts(p.shape[1], resamples, seed, "removals")
    each = [
        (_one_test(x, y, torch.ones_like(removals[:1])), _one_test(x, y, removals)) for x, y in zip(p, a, strict=True)
    ]
    tests = resample_counts(len(p), resamples, seed, "tests")
    means = {name: torch.stack([point[name] for point, _ in each], dim=1).nanmean(dim=1) for name in METRICS}
    spread = {name: weighted_means(torch.stack([d[name] for _, d in each], dim=1), tests) for name in METRICS}
    frames.append(_frame(means, spread, confidence, p.numel()).assign(scope="mean"))
    for name, (point, drawn) in zip(row_ids(scores, len(p)), each, strict=True):
        frames.append(_frame(point, drawn, confidence, p.shape[1]).assign(scope="test", test=name))
    frame = pd.concat(frames, ignore_index=True)
    return frame[["scope", "test", *frame.columns.drop(["scope", "test"])]]


def predicted_changes(values: Float64[Tensor, "k n"], ground_truth: GroundTruth) -> Float64[Tensor, "k m"]:
    """Σ_{j left out} τ_ij / n: what leaving the rest of each subset out should do to the measurements."""
    return values @ (~ground_truth.masks).double().T / ground_truth.n_train


def _checked(predicted: Tensor | ArrayLike, measured: Tensor | ArrayLike) -> tuple[Tensor, Tensor]:
    p, a = (torch.atleast_2d(torch.as_tensor(each).detach().cpu().double()) for each in (predicted, measured))
    if p.shape != a.shape or p.ndim != 2:
        raise DataError(f"predicted has shape {tuple(p.shape)}, measured {tuple(a.shape)}: give both (tests, removals)")
    if p.numel() < 3:
        raise DataError(f"there are {p.numel()} pairs: agreement needs 3 at the least")
    if bad := int((~torch.isfinite(p) | ~torch.isfinite(a)).sum()):
        raise DataError(f"{bad} of {p.numel()} pairs hold NaN or Inf")
    return p, a


def _all_pairs(p: Tensor, a: Tensor, resamples: int, seed: int) -> tuple[Draws, Draws]:
    k, m = p.shape
    tests = resample_counts(k, resamples, seed, "tests") if k > 1 else torch.ones(resamples, 1, dtype=p.dtype)
    removals = resample_counts(m, resamples, seed, "removals") if m > 1 else torch.ones(resamples, 1, dtype=p.dtype)
    point = _metrics(p, a, torch.ones(1, k, dtype=p.dtype), torch.ones(1, m, dtype=p.dtype))
    return point, _metrics(p, a, tests, removals)


def _one_test(p: Float64[Tensor, " m"], a: Float64[Tensor, " m"], removals: Float64[Tensor, "r m"]) -> Draws:
    return _metrics(p[None], a[None], torch.ones(len(removals), 1, dtype=p.dtype), removals)


def _metrics(
    p: Float64[Tensor, "k m"], a: Float64[Tensor, "k m"], v: Float64[Tensor, "r k"], u: Float64[Tensor, "r m"]
) -> Draws:
    """Every metric in resamples that hold pair (i, j) v_i·u_j times; all but ranks are of bilinear moments vᵀFu."""
    found = _moment_metrics(p, a, v, u)
    everywhere = torch.ones_like(p)
    signed = []
    for sign in (p > 0, p < 0):
        masked = _Moments(p, a, everywhere * sign, v, u)
        enough = masked.distinct >= FEWEST_OF_A_SIGN
        signed.append(torch.where(enough, masked.pearson, torch.nan))
    found["within_sign"] = torch.stack(signed).nanmean(dim=0)
    step = max(1, CHUNK_NUMBERS // p.numel())
    parts = []
    for some_v, some_u in zip(v.split(step), u.split(step), strict=True):
        weights = torch.einsum("rk,rm->kmr", some_v, some_u).reshape(p.numel(), -1)
        parts.append(spearman(p.reshape(-1), a.reshape(-1), weights))
    found["spearman"] = torch.cat(parts)
    return {name: found[name] for name in METRICS}


def _moment_metrics(p: Tensor, a: Tensor, v: Tensor, u: Tensor) -> Draws:
    moments = _Moments(p, a, torch.ones_like(p), v, u)
    squared_error = moments.mean((p - a).square())
    return {
        "pearson": moments.pearson,
        "slope": moments.covariance / moments.variance_a,
        "r2": 1 - squared_error / moments.variance_a,
        "rmse_over_sd": (squared_error / moments.variance_a).sqrt(),
    }


class _Moments:
    """Weighted means, variances and the covariance of p and a over the pairs of a mask."""

    def __init__(self, p: Tensor, a: Tensor, mask: Tensor, v: Tensor, u: Tensor) -> None:
        self.mask, self.v, self.u = mask, v, u
        self.total = self._sum(torch.ones_like(p))
        self.distinct = ((v > 0).to(p) @ mask * (u > 0)).sum(dim=1)
        floor_p, floor_a = (ROUNDING * x.square().mean() for x in (p, a))
        # Centred first, by one mean for all resamples, so that squares do not cancel.
        count = mask.sum().clamp(min=1)
        p, a = (x - (x * mask).sum() / count for x in (p, a))
        mean_p, mean_a = self.mean(p), self.mean(a)
        self.variance_p = self._variance(p, mean_p, floor_p)
        self.variance_a = self._variance(a, mean_a, floor_a)
        self.covariance = self.mean(p * a) - mean_p * mean_a

    def _sum(self, values: Tensor) -> Tensor:
        return (self.v @ (values * self.mask) * self.u).sum(dim=1)

    def mean(self, values: Tensor) -> Tensor:
        return self._sum(values) / self.total

    def _variance(self, values: Tensor, mean: Tensor, floor: Tensor) -> Tensor:
        squares = self.mean(values.square())
        variance = squares - mean.square()
        return torch.where(variance > RESAMPLED_ROUNDING * squares + floor, variance, torch.nan)

    @property
    def pearson(self) -> Tensor:
        return (self.covariance / (self.variance_p * self.variance_a).sqrt()).clamp(-1, 1)


def _frame(points: Mapping[str, Tensor], draws: Draws, confidence: float, n: int) -> pd.DataFrame:
    rows = []
    for name in METRICS:
        value = float(points[name][0])
        if name in CORRELATIONS:
            low, high = correlation_interval(value, draws[name], confidence)
        else:
            low, high = map(float, percentile_interval(draws[name], confidence))
        rows.append({"metric": name, "value": value, "low": low, "high": high, "confidence": confidence, "n": n})
    return pd.DataFrame(rows)
