"""Plain and ridge leverage through the triangular factor of X: the rank is decided at ε·σ₁, not at √ε·σ₁."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.leverage.examples import Examples
from refluence.leverage.forms import squared_lengths, trapezoid
from refluence.leverage.scores import RankGap

EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Spectrum:
    """σ of the (weighted, centred) rows, descending, and V as columns; `scale` bounds the size of what was rounded."""

    sigma: Float64[Tensor, " r"]
    V: Float64[Tensor, "k r"]
    scale: float


def singular_values(examples: Examples) -> Spectrum:
    """X = QR by one pass (TSQR: R of a stretch below the R so far), then the SVD of R.

    2nd² flops and one pass. Householder QR is backward stable whatever the rank, and the rank is not read off R: only
    R's singular values are used, so that zero columns leave no spurious direction.

    Source: Demmel, Grigori, Hoemmen & Langou, Communication-optimal parallel and sequential QR, SISC 2012.
    """
    R = torch.empty(0, examples.d, dtype=torch.float64, device=examples.matrix.device)
    for rows in examples.reduced("triangular factor"):
        R = torch.linalg.qr(torch.cat([R, rows]), mode="r").R
    kept, factors = examples.columns
    return of_matrix(R[:, kept] * factors, examples)


def of_matrix(R: Float64[Tensor, "m k"], examples: Examples) -> Spectrum:
    """σ and V of a matrix that stands for the rows."""
    _, sigma, Vh = torch.linalg.svd(R, full_matrices=False)
    return Spectrum(sigma, Vh.T, size_before_centring(examples, sigma))


def size_before_centring(examples: Examples, sigma: Float64[Tensor, " r"]) -> float:
    """σ₁, or √Σw·‖x̄‖ where that is larger: what was taken away has left its rounding."""
    kept, _ = examples.columns
    offset = 0.0 if examples.mean is None else float(examples.mean[kept].norm()) * examples.total_weight**0.5
    return max(float(sigma[0]) if sigma.numel() else 0.0, offset)


def cut(spectrum: Spectrum, n: int, d: int, rtol: float | None) -> tuple[int, RankGap | None]:
    """(rank, where it was cut): singular values above max(n, d)·ε·σ₁ count, or above rtol·σ₁.

    Of centred rows σ₁ is at least √n‖x̄‖, the size of what was taken away and so of the rounding.
    """
    sigma = spectrum.sigma
    floor = (max(n, d) * EPSILON if rtol is None else rtol) * spectrum.scale
    rank = int((sigma > floor).sum())
    if rank == 0:
        return 0, None
    dropped = float(sigma[rank]) if rank < sigma.numel() else 0.0
    return rank, RankGap(float(sigma[rank - 1]), dropped, floor)


def plain_leverage(examples: Examples, spectrum: Spectrum, rank: int) -> Float64[Tensor, " n"]:
    """‖x_iᵀ V_r Σ_r⁻¹‖², the squared lengths of the rows of an orthonormal basis of X's column space."""
    return squared_lengths(examples, trapezoid(spectrum.V[:, :rank] / spectrum.sigma[:rank]), "leverage").clamp_(max=1)


def ridge_leverage(examples: Examples, spectrum: Spectrum, rank: int, damping: float) -> Float64[Tensor, " n"]:
    """‖x_iᵀ V_r (Σ_r² + nλ)^(−½)‖²; what is below the cut is rounding, which a tiny λ would blow up."""
    root = (spectrum.sigma[:rank].square() + examples.n * damping).sqrt()
    return squared_lengths(examples, trapezoid(spectrum.V[:, :rank] / root), "leverage").clamp_(max=1)
