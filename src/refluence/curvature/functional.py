"""Curvatures known by products only, made by passes over the data: the Hessian, and the GGN of many outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from refluence.batches import rows_of
from refluence.curvature.base import Curvature, Vectors
from refluence.gradients.rows import GradientRows
from refluence.skipping import refuse_bad

Products = Callable[[tuple[str, ...], Any, Tensor, dict[str, Tensor]], dict[str, Tensor]]
"""(parameter names, batch, weights of its examples, name → (k, *shape)) → name → Σ_i w_i C_i v of these parameters."""


class FunctionalCurvature(Curvature):
    """C_b v by forward and reverse differentiation of one batch after the other, whatever the model and the loss.

    A block's product differentiates in that block's parameters only. Products are made in the dtype of the parameters.

    Args:
        products: of one batch.
    """

    def __init__(
        self,
        name: str,
        rows: GradientRows,
        products: Products,
        weights: Float[Tensor, " n"] | None = None,
        positive: bool = False,
    ) -> None:
        super().__init__(name, rows, weights, positive)
        self._products = products

    def matvec(self, vectors: Vectors) -> Vectors:
        """Block → C_b V_b, in one pass over the data."""
        found = self.total(_products, vectors)
        return {block: (total.to(vectors[block]) / self.n).T for block, total in found.items()}

    def sampled(self, rows: Int64[Tensor, " b"], vectors: Vectors) -> Vectors:
        """Block → (1/b) Σ_{i ∈ rows} w_i C_i V."""
        found = self.total(_sampled_products, rows, vectors)
        return {block: (flat.to(vectors[block]) / len(rows)).T for block, flat in found.items()}

    def _of_batch(
        self, batch: Any, rows: Int64[Tensor, " b"], given: dict[str, dict[str, Tensor]]
    ) -> dict[str, Float[Tensor, "k d"]]:
        capture = self.rows.capture
        weights = torch.ones(len(rows), dtype=torch.float64) if self.weights is None else self.weights[rows.cpu()]
        flat = {}
        for block, named in given.items():
            names = capture.groups[block]
            with capture.ready():
                found = self._products(names, batch, weights.to(self.device), named)
            # Not flatten(1), which a parameter without dimensions has not.
            pieces = [found[name].reshape(len(found[name]), capture.shapes[name].numel()) for name in names]
            flat[block] = torch.cat(pieces, dim=1)
            if not bool(torch.isfinite(flat[block].sum())):
                refuse_bad(capture.task, capture.model, self.rows.batches, rows.tolist())
        return flat

    def _named(self, block: str, vectors: Float[Tensor, "d k"]) -> dict[str, Tensor]:
        capture = self.rows.capture
        names = capture.groups[block]
        pieces = vectors.T.split([capture.shapes[name].numel() for name in names], dim=1)
        return {
            name: piece.to(capture.parameters[name].dtype).reshape(-1, *capture.shapes[name])
            for name, piece in zip(names, pieces, strict=True)
        }


def _products(part: FunctionalCurvature, vectors: Vectors) -> dict[str, Float[Tensor, "k d"]]:
    """Block → Σ w_i C_i V, transposed."""
    totals: dict[str, Tensor] = {}
    given = {block: part._named(block, v) for block, v in vectors.items()}
    for start, batch in part.rows.capture.running(part.rows.batches):
        rows = torch.arange(start, start + rows_of(batch))
        for block, flat in part._of_batch(batch, rows, given).items():
            flat = flat.to(vectors[block].dtype)
            totals[block] = totals[block].add_(flat) if block in totals else flat
    return totals


def _sampled_products(
    part: FunctionalCurvature, rows: Int64[Tensor, " b"], vectors: Vectors
) -> dict[str, Float[Tensor, "k d"]]:
    """Block → Σ w_i C_i V over those of the rows that are the part's, transposed."""
    rows = part.rows.own(rows)
    if not rows.numel():
        return {block: torch.zeros_like(v.T) for block, v in vectors.items()}
    given = {block: part._named(block, v) for block, v in vectors.items()}
    found = part._of_batch(part.rows.batches.select(rows.tolist()), rows, given)
    return {block: flat.to(vectors[block].dtype) for block, flat in found.items()}
