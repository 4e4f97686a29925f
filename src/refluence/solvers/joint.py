"""The damped curvature of several blocks as one map."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.curvature import Curvature, Vectors
from refluence.solvers.state import Shifts


class JointSystem:
    """The damped curvature of several blocks as one map on their concatenation."""

    def __init__(self, curvature: Curvature, preconditioner: Any, sizes: dict[str, int], shifts: Shifts) -> None:
        self.curvature, self.preconditioner, self.sizes, self.shifts = curvature, preconditioner, sizes, shifts
        self.products = 0

    def join(self, vectors: Vectors) -> Float[Tensor, "d k"]:
        """One matrix, each column contiguous."""
        if len(vectors) == 1:
            return next(iter(vectors.values()))
        return torch.cat([vectors[block].T for block in self.sizes], dim=1).T

    def split(self, joint: Float[Tensor, "d k"]) -> Vectors:
        """Views of the blocks."""
        return dict(zip(self.sizes, joint.split(list(self.sizes.values())), strict=True))

    def apply(self, joint: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """C_b V_b + μ_b V_b, in one pass over the data."""
        self.products += 1
        vectors = self.split(joint)
        products = self.curvature.matvec(vectors)
        return self.join({block: products[block].add_(v, alpha=self.shifts[block]) for block, v in vectors.items()})

    def precondition(self, joint: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """The preconditioner's solution, in the dtype given."""
        return self.join(self.preconditioner.solve(self.split(joint), self.shifts).values).to(joint.dtype)
