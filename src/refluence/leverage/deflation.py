"""An orthonormal basis of the column space of X from Gram matrices alone, to the accuracy of a QR factorisation.

The Gram matrix shows directions down to a two-thousandth of σ₁ with nine digits. What lies below is taken again: freed
of the directions found, by products with X itself, its own Gram matrix shows the next ones, and so on down to ε·σ₁.
Each further level costs products with few columns; a QR factorisation costs several times the Gram matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.leverage.examples import Examples
from refluence.leverage.scores import RankGap
from refluence.leverage.triangle import EPSILON, size_before_centring
from refluence.solvers.psd import PositiveMatrix

LEVEL = 5e-4
"""Singular values above this share of the largest are taken at a level: rounding is then ε/LEVEL² = 9e-10."""


@dataclass(frozen=True, eq=False)
class Basis:
    """W with (XW)ᵀ(XW) + shift·WᵀW = I, the rank and where it was cut."""

    W: Float64[Tensor, "k r"]
    rank: int
    gap: RankGap | None


def deflated_basis(examples: Examples, system: PositiveMatrix, shift: float = 0.0, rtol: float | None = None) -> Basis:
    """W whose columns X maps to an orthonormal basis; with a shift, [X; √shift·I] does.

    Args:
        examples: after their first pass.
        system: XᵀX/n of the kept columns.
        shift: nλ.
        rtol: singular values above rtol·σ₁ count; None: above max(n, d)·ε·σ₁.
    """
    moment, vectors = system.eigendecomposition()
    values = moment * examples.n + shift
    top = float(values[-1])
    scale = size_before_centring(examples, values[-1:].sqrt())
    cut = (max(examples.n, examples.d) * EPSILON if rtol is None else rtol) * scale
    taken = (values > LEVEL**2 * top) & (values - shift > cut**2)
    W = vectors[:, taken] / values[taken].sqrt()
    smallest = float(values[taken].min() - shift) ** 0.5 if bool(taken.any()) else 0.0
    rest, dropped = vectors[:, ~taken], 0.0
    while rest.shape[1]:
        across, own = _products(examples, rest)
        across += shift * rest
        own += shift * (rest.T @ rest)
        found = W.T @ across
        rest = rest - W @ found
        values, vectors = torch.linalg.eigh(own - found.T @ found)
        top = float(values[-1])
        if top - shift <= cut**2:
            dropped = max(top - shift, 0.0) ** 0.5
            break
        taken = (values > LEVEL**2 * top) & (values - shift > cut**2)
        W = torch.cat([W, rest @ (vectors[:, taken] / values[taken].sqrt())], dim=1)
        smallest = float(values[taken].min() - shift) ** 0.5
        rest = rest @ vectors[:, ~taken]
    rank = W.shape[1]
    # nothing below the rounding of X itself is known
    gap = RankGap(smallest, max(dropped, EPSILON * scale) if rank < system.size else 0.0, cut)
    return Basis(W, rank, gap if rank else None)


def _products(examples: Examples, B: Float64[Tensor, "k s"]) -> tuple[Float64[Tensor, "k s"], Float64[Tensor, "s s"]]:
    """(XᵀXB, (XB)ᵀ(XB)), each from the rows of XB."""
    wide = examples.embed(B)
    across, own = torch.zeros_like(wide), torch.zeros(B.shape[1], B.shape[1], dtype=B.dtype, device=B.device)
    for _, rows in examples.rows("small directions"):
        Y = rows @ wide
        across.addmm_(rows.T, Y)
        own.addmm_(Y.T, Y)
    return examples.restrict(across), (own + own.T) / 2
