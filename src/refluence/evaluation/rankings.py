"""How far two rankings of the same items agree: over all of them, and at the top."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float64, Int64
from scipy import stats
from torch import Tensor

from refluence.errors import DataError


def kendall_tau(a: Float64[Tensor, " n"], b: Float64[Tensor, " n"]) -> float:
    """Kendall's τ_b: (concordant − discordant) pairs over √((pairs not tied in a)(pairs not tied in b)); O(n log n)."""
    _check(a, b)
    return float(stats.kendalltau(a.numpy(), b.numpy()).statistic)


def swap_fraction(tau: float) -> float:
    """The share of pairs that stand in different order, (1 − τ)/2 without ties; 1/2 by chance."""
    return (1 - tau) / 2


def spearman_rho(a: Float64[Tensor, " n"], b: Float64[Tensor, " n"]) -> float:
    """Spearman's rank correlation, ties averaged."""
    _check(a, b)
    return float(stats.spearmanr(a.numpy(), b.numpy()).statistic)


def ordering(scores: Float64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """The items from the highest score to the lowest, the lowest item first on ties."""
    return scores.argsort(descending=True, stable=True)


def overlaps(a: Float64[Tensor, " n"], b: Float64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """o_k = |top k of a ∩ top k of b| for k = 1, …, n, in O(n log n).

    An item is in both from the larger of its two ranks on.
    """
    _check(a, b)
    n = len(a)
    places = torch.arange(n)
    rank_a, rank_b = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int64)
    rank_a[ordering(a)] = places
    rank_b[ordering(b)] = places
    return torch.bincount(torch.maximum(rank_a, rank_b), minlength=n).cumsum(dim=0)


def corrected_overlap(overlap: Float64[Tensor, " m"], k: Int64[Tensor, " m"], n: int) -> Float64[Tensor, " m"]:
    """κ = (o/k − k/n)/(1 − k/n): 0 by chance, 1 for the same items; NaN at k = n, where no choice is left."""
    chance = k.double() / n
    return torch.where(k < n, (overlap / k - chance) / (1 - chance), torch.nan)


def overlap_by_chance(
    k: Int64[Tensor, " m"], n: int, tail: float = 1e-3
) -> tuple[Float64[Tensor, " m"], Float64[Tensor, " m"], Float64[Tensor, " m"]]:
    """(mean k²/n, lower, upper `tail` quantile) of o_k for two independent rankings: Hypergeometric(n, k, k).

    Raises:
        DataError: a tail outside (0, 1/2).
    """
    if not 0 < tail < 0.5:
        raise DataError(f"tail must lie between 0 and 0.5, not {tail!r}")
    null = stats.hypergeom(n, k.numpy(), k.numpy())
    low, high = (torch.from_numpy(np.asarray(null.ppf(q), dtype=np.float64)) for q in (tail, 1 - tail))
    return k.double().square() / n, low, high


def rank_biased_overlap(overlap: Int64[Tensor, " n"], depth: float) -> float:
    """RBO = (1 − p) Σ_{k≤n} p^{k−1} o_k/k + pⁿ, p = 1 − 1/depth: the mean overlap of the tops, the first count most.

    `depth` is the expected depth to which a reader goes. Beyond n, where all items are in both, the overlap is 1. By
    chance o_k/k is k/n.

    Args:
        overlap: o_k of `overlaps`.
        depth: above 1.

    Raises:
        DataError: a depth of 1 or less.

    Source: Webber, Moffat & Zobel 2010, eq. 7.
    """
    if not (depth > 1 and math.isfinite(depth)):
        raise DataError(f"the depth of a rank-biased overlap must be above 1, not {depth!r}")
    k = torch.arange(1, len(overlap) + 1, dtype=torch.float64)
    log_p = math.log1p(-1 / depth)
    weights = ((k - 1) * log_p).exp() / depth
    return float((weights * overlap / k).sum() + math.exp(len(overlap) * log_p))


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or len(a) < 2:
        raise DataError(f"two rankings of the same items are needed, not {tuple(a.shape)} and {tuple(b.shape)}")
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise DataError("scores that are NaN or infinite have no rank")
