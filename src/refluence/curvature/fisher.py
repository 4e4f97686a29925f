"""The empirical Fisher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.gradients.rows import GradientRows


@dataclass(frozen=True, eq=False)
class EmpiricalFisher:
    """C = (1/n) Σ_i w_i g_i g_iᵀ of the per-example loss gradients, block by block.

    It offers solvers its gradient rows, and products for those that need no more.
    """

    rows: GradientRows
    weights: Float[Tensor, " n"] | None = None

    @property
    def n(self) -> int:
        """The number of examples."""
        return self.rows.n

    @property
    def dimensions(self) -> dict[str, int]:
        """Block → d."""
        return {group: self.rows.dimension(group) for group in self.rows.groups}

    def matvec(self, vectors: dict[str, Float[Tensor, "d k"]]) -> dict[str, Float[Tensor, "d k"]]:
        """Block → C_b V_b, in one pass over the rows."""
        out = {group: torch.zeros_like(v) for group, v in vectors.items()}
        for start, blocks in self.rows:
            for group, v in vectors.items():
                products = blocks[group].matvec(v)
                if self.weights is not None:
                    products *= self.weights[start : start + products.shape[0], None].to(products)
                out[group] += blocks[group].rmatvec(products) / self.n
        return out

    def traces(self) -> dict[str, float]:
        """Block → tr C, the weighted mean squared norm of its gradients."""
        totals = dict.fromkeys(self.rows.groups, 0.0)
        for start, blocks in self.rows:
            for group, block in blocks.items():
                norms = block.squared_norms()
                if self.weights is not None:
                    norms = norms * self.weights[start : start + block.n].to(norms)
                totals[group] += float(norms.sum()) / self.n
        return totals
