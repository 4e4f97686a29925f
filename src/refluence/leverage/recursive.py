"""Approximate ridge leverage by recursive sampling (Musco & Musco, NeurIPS 2017): rows are drawn by the scores that
fewer rows gave.

A score from a part of the rows is no less than the true one. So the rows are halved until few are left; those few give
scores for twice as many, of which rows are drawn, and so on to all of them. With B the drawn rows over √probability,
x(BᵀB + nλ)⁻¹x are the scores: where B has fewer rows than columns, by (‖x‖² − xBᵀ(BBᵀ + nλ)⁻¹Bx)/(nλ).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.leverage.examples import Examples
from refluence.leverage.forms import squared_lengths

SMALLEST = 256


@dataclass(frozen=True, eq=False)
class DrawnRows:
    """B, with (BᵀB + shift)⁻¹ through the smaller of its two Gram matrices."""

    B: Float64[Tensor, "s k"]
    shift: float

    def __post_init__(self) -> None:
        s, k = self.B.shape
        gram = self.B @ self.B.T if s < k else self.B.T @ self.B
        gram.diagonal().add_(self.shift)
        factor = torch.linalg.cholesky(gram)
        unit = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, unit, upper=False)
        object.__setattr__(self, "root", self.B.T @ inverse.T if s < k else inverse.T)

    root: Tensor = None  # type: ignore[assignment]

    @property
    def few(self) -> bool:
        """Whether B has fewer rows than columns; (BᵀB + shift)⁻¹ is then (I − root rootᵀ)/shift, else root rootᵀ."""
        return self.B.shape[0] < self.B.shape[1]

    def inverse(self, V: Float64[Tensor, "k s"]) -> Float64[Tensor, "k s"]:
        """(BᵀB + shift)⁻¹V."""
        product = self.root @ (self.root.T @ V)
        return (V - product) / self.shift if self.few else product

    def forms(self, rows: Float64[Tensor, "b k"]) -> Float64[Tensor, " b"]:
        """x(BᵀB + shift)⁻¹x of some rows."""
        lengths = torch.linalg.vector_norm(rows @ self.root, dim=1).square_()
        return (rows.square().sum(dim=1) - lengths).clamp_(min=0) / self.shift if self.few else lengths

    def all_forms(self, examples: Examples) -> Float64[Tensor, " n"]:
        """x(BᵀB + shift)⁻¹x of all rows."""
        if not self.few:
            return squared_lengths(examples, self.root, "leverage")
        kept, factors = examples.columns
        parts = [self.forms(rows[:, kept] * factors) for _, rows in examples.rows("leverage")]
        return torch.cat(parts)


def drawn_rows(examples: Examples, shift: float, accuracy: float, seed: int) -> DrawnRows:
    """Rows i in B with probability min(1, q h̃_i), q = max(1/ε², 4 log n), divided by its root."""
    n, device = examples.n, examples.matrix.device
    generator = np.random.default_rng(seed)
    order = torch.from_numpy(generator.permutation(n)).to(device)
    place = torch.empty_like(order)
    place[order] = torch.arange(n, device=device)
    q = max(1 / accuracy**2, 4 * float(np.log(n)))
    size = n
    while size > SMALLEST and size > 4 * q:
        size = -(-size // 2)
    drawn: DrawnRows | None = None
    while True:
        parts = []
        chance = torch.from_numpy(generator.random(n)).to(device)
        for start, rows in examples.rows("recursive sampling"):
            here = (place[start : start + rows.shape[0]] < size).nonzero()[:, 0]
            if not here.numel():
                continue
            kept, factors = examples.columns
            some = rows[here][:, kept] * factors
            if drawn is None:
                parts.append(some)
                continue
            probability = (q * drawn.forms(some)).clamp(max=1)
            taken = chance[start + here] < probability
            parts.append(some[taken] / probability[taken, None].sqrt())
        drawn = DrawnRows(torch.cat(parts), shift)
        if size == n:
            return drawn
        size = min(n, 2 * size)
