"""Leverage through C = XᵀX/n: half the work of the triangular factor, and half of its digits.

The rounding of C is ε·σ₁², so singular values below some √ε·σ₁ are not seen.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.leverage.examples import Examples
from refluence.leverage.forms import squared_lengths, trapezoid
from refluence.leverage.scores import RankGap
from refluence.leverage.triangle import size_before_centring
from refluence.solvers.psd import PositiveMatrix
from refluence.theory.spectrum import EPSILON

PANELS = 4


def second_moment(examples: Examples) -> PositiveMatrix:
    """C = XᵀX/n of the kept columns, by one pass."""
    d = examples.d
    total = torch.zeros(d, d, dtype=torch.float64, device=examples.matrix.device)
    for rows in examples.reduced("Gram matrix"):
        _add_gram(total, rows)
    kept, factors = examples.columns
    total = total[kept][:, kept] * (factors * factors[:, None]) / examples.n
    return PositiveMatrix((total + total.T) / 2)


def _add_gram(total: Float64[Tensor, "d d"], rows: Float64[Tensor, "c d"]) -> None:
    """Add rowsᵀ rows: by NumPy, which computes one half of it and mirrors it; elsewhere by panels."""
    if rows.device.type == "cpu":
        array = rows.numpy()
        with np.errstate(over="ignore", invalid="ignore"):  # seen by the trace, and QR is taken then
            total += torch.from_numpy(array.T @ array)
        return
    d = rows.shape[1]
    width = -(-d // PANELS)
    for j in range(0, d, width):
        products = rows[:, j:].T @ rows[:, j : j + width]
        total[j:, j : j + width] += products
        total[j : j + width, j + width :] += products[width:].T


def gram_cut(
    system: PositiveMatrix, examples: Examples, rtol: float | None, relative: float | None = None
) -> tuple[int, RankGap | None]:
    """(rank, where it was cut): singular values above `relative`·σ₁ count, above rtol·σ₁ where that is larger.

    Args:
        relative: None: √(max(n, d)·ε), what the rounding of XᵀX leaves.
    """
    system.eigendecomposition()  # the vectors are wanted next, and the values come with them
    sigma = torch.from_numpy(system.eigenvalues).flip(0).mul(examples.n).sqrt()
    if not sigma.numel():
        return 0, None
    share = (max(examples.n, examples.d) * EPSILON) ** 0.5 if relative is None else relative
    floor = max(share, rtol or 0.0) * size_before_centring(examples, sigma)
    rank = int((sigma > floor).sum())
    if rank == 0:
        return 0, None
    return rank, RankGap(float(sigma[rank - 1]), float(sigma[rank]) if rank < sigma.numel() else 0.0, floor)


def plain_rounding(system: PositiveMatrix, rank: int) -> float:
    """ε σ₁²/σ_rank², the relative rounding error of a score at λ = 0."""
    values = system.eigenvalues
    return float(EPSILON * values[-1] / values[system.size - rank]) if rank else 0.0


def ridge_rounding(system: PositiveMatrix, damping: float) -> float:
    """ε tr C/λ, a bound on the relative rounding error of a score."""
    return float(EPSILON * system.matrix.trace()) / damping


def plain_leverage(examples: Examples, system: PositiveMatrix, rank: int) -> Float64[Tensor, " n"]:
    """‖x_iᵀ V_r Λ_r^(−½)‖²/n."""
    values, vectors = system.eigendecomposition()
    W = vectors[:, system.size - rank :] / (examples.n * values[system.size - rank :]).sqrt()
    return squared_lengths(examples, trapezoid(W), "leverage").clamp_(max=1)


def ridge_leverage(examples: Examples, system: PositiveMatrix, damping: float) -> Float64[Tensor, " n"]:
    """x_iᵀ (C + λI)⁻¹ x_i / n by a Cholesky factor."""
    return squared_lengths(examples, system.inverse_root(damping) / examples.n**0.5, "leverage").clamp_(max=1)
