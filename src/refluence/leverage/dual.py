"""Leverage where there are fewer rows than columns, through the n×n matrix XXᵀ/n."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.leverage.examples import Examples
from refluence.leverage.triangle import Spectrum, size_before_centring
from refluence.solvers.psd import PositiveMatrix


def all_rows(examples: Examples) -> Float64[Tensor, "n k"]:
    """The rows together."""
    examples.keep_all_columns()
    return torch.cat([rows for _, rows in examples.rows("rows")])


def dual_moment(rows: Float64[Tensor, "n k"], n: int) -> PositiveMatrix:
    """XXᵀ/n: its `leverages(λ)`, the diagonal of M(M+λI)⁻¹, are the ridge leverages."""
    return PositiveMatrix(rows @ rows.T / n)


def left_vectors(rows: Float64[Tensor, "n k"], examples: Examples) -> Spectrum:
    """σ and U (in the place of V) of X, from the triangular factor of Xᵀ: digits of XXᵀ would be lost."""
    L = torch.linalg.qr(rows.T, mode="r").R.T
    U, sigma, _ = torch.linalg.svd(L, full_matrices=False)
    return Spectrum(sigma, U, size_before_centring(examples, sigma))
