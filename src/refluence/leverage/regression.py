"""Cook's distance and DFFITS of a least-squares fit, from its leverage scores and residuals.

p is the rank, s² = Σr²/(n − p). A row with h = 1 is fitted exactly whatever its target: it has no residual to judge it
by, and without it a coefficient is undetermined. Both measures are infinite there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.errors import DataError
from refluence.leverage.scores import LeverageScores

ALONE = 1 - 1e-9
"""A leverage above it is 1 but for rounding."""


def studentized_residuals(scores: LeverageScores, residuals: Sequence[float] | Tensor) -> Float64[Tensor, " n"]:
    """t_i = r_i / (s₍ᵢ₎ √(1−h_i)) with s₍ᵢ₎² = ((n−p)s² − r_i²/(1−h_i)) / (n−p−1), of the fit without row i.

    Externally studentised: for normal errors t_i has Student's distribution with n−p−1 degrees of freedom. NaN where
    h_i = 1.

    Raises:
        DataError: ridge or approximate scores, residuals of another length, n − p < 2.

    Source: Belsley, Kuh & Welsch, Regression Diagnostics, 1980, section 2.1.
    """
    h, r = _checked(scores, residuals)
    freedom = h.numel() - _rank(scores)
    if freedom < 2:
        raise DataError(f"{h.numel()} rows of rank {_rank(scores)} leave {freedom} degrees of freedom: two are needed")
    left = 1 - h
    without = (r.square().sum() - r.square() / left).clamp(min=0) / (freedom - 1)
    return torch.where(h > ALONE, torch.nan, r / (without * left).sqrt())


def cooks_distance(scores: LeverageScores, residuals: Sequence[float] | Tensor) -> Float64[Tensor, " n"]:
    """D_i = r_i² h_i / (p s² (1−h_i)²): how far the fit moves without row i, in units of p s²; ∞ where h_i = 1.

    Args:
        scores: plain leverage of the features (with `intercept=True` where the fit has one).
        residuals: y − ŷ of the least-squares fit on the same features.

    Raises:
        DataError: ridge or approximate scores, residuals of another length, n ≤ p.

    Source: Cook, Detection of influential observation in linear regression, Technometrics 1977.
    """
    h, r = _checked(scores, residuals)
    p = _rank(scores)
    if h.numel() <= p:
        raise DataError(f"{h.numel()} rows of rank {p} leave no degree of freedom: the fit is exact")
    variance = r.square().sum() / (h.numel() - p)
    return torch.where(h > ALONE, torch.inf, r.square() * h / (p * variance * (1 - h).square()))


def dffits(scores: LeverageScores, residuals: Sequence[float] | Tensor) -> Float64[Tensor, " n"]:
    """DFFITS_i = t_i √(h_i/(1−h_i)): how far the own fitted value moves without row i, in its standard errors.

    t_i are the `studentized_residuals`; ∞ where h_i = 1.

    Raises:
        DataError: as `studentized_residuals`.

    Source: Belsley, Kuh & Welsch, Regression Diagnostics, 1980, equation 2.11.
    """
    h, _ = _checked(scores, residuals)
    moved = studentized_residuals(scores, residuals) * (h / (1 - h)).sqrt()
    return torch.where(h > ALONE, torch.inf, moved)


def _rank(scores: LeverageScores) -> int:
    assert scores.rank is not None
    return scores.rank


def _checked(scores: LeverageScores, residuals: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
    if scores.rank is None or scores.method == "sketch":
        what = f"ridge scores (λ = {scores.damping:.3g})" if scores.rank is None else "approximate scores"
        raise DataError(f"{what} are given, and these formulas are of a least-squares fit: use leverage_scores(X)")
    r = torch.as_tensor(residuals, dtype=torch.float64, device=scores.values.device)
    if r.shape != scores.values.shape:
        raise DataError(f"there are {scores.values.numel():,} scores and residuals of shape {tuple(r.shape)}")
    if not bool(torch.isfinite(r).all()):
        raise DataError(f"the residual of row {int((~torch.isfinite(r)).nonzero()[0])} is not finite")
    if not bool(r.any()):
        raise DataError("all residuals are 0: the fit is exact, and nothing moves without a row")
    return scores.values, r
