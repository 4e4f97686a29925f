"""Sketched scores of one size at many dampings, by whichever factorisation is less work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.errors import RefluenceError

EIGENVECTORS_WORK = 27.0
"""Time of LAPACK's symmetric eigenvectors over that of s³/3 multiply-adds of a Cholesky factor."""


@dataclass(frozen=True, eq=False)
class SketchedSystem:
    """τ̃_μ = L (M + μI)⁻¹ R of a sketch of m rows, from whichever side is smaller.

    With PG (n×m) and PV (k×m): L = PG, M = PGᵀPG/n, R = PVᵀ where m < n, and by push-through L = I, M = PG PGᵀ/n,
    R = PG PVᵀ beyond.

    Args:
        size: m.
        curvature: M, (s, s).
        left: L, (rows, s); None: the identity.
        right: R, (s, k).
        dual: M stands for (PF^{1/2})ᵀPF^{1/2} or PG PGᵀ/n, not for PFPᵀ.
    """

    size: int
    curvature: Float64[Tensor, "s s"]
    left: Float64[Tensor, "rows s"] | None
    right: Float64[Tensor, "s k"]
    dual: bool = False

    def summed(self, weights: Float64[Tensor, "r rows"]) -> SketchedSystem:
        """The system of weighted sums of its rows, which never forms the scores."""
        return replace(self, left=weights if self.left is None else weights @ self.left)

    def first_rows(self, count: int) -> SketchedSystem:
        """The system of its first rows."""
        if self.left is None:
            eye = torch.eye(count, len(self.curvature), dtype=torch.float64, device=self.curvature.device)
            return replace(self, left=eye)
        return replace(self, left=self.left[:count])

    def scores(self, dampings: Sequence[float]) -> Iterator[Float64[Tensor, "rows k"]]:
        """τ̃_μ at each μ > 0, rows × tests: a Cholesky factor for each, or one eigendecomposition for all.

        Raises:
            RefluenceError: M + μI is singular to rounding.
        """
        size, k = self.right.shape
        rows = size if self.left is None else self.left.shape[0]
        if not eigenvectors_pay(size, k, rows, len(dampings)):
            for damping in dampings:
                solved = torch.cholesky_solve(self.right, self._factor(damping))
                yield solved if self.left is None else self.left @ solved
            return
        values, vectors = torch.linalg.eigh(self.curvature)
        values.clamp_(min=0.0)
        left = vectors if self.left is None else self.left @ vectors
        right = vectors.T @ self.right
        for damping in dampings:
            yield left @ (right / (values + damping)[:, None])

    def _factor(self, damping: float) -> Float64[Tensor, "s s"]:
        shifted = self.curvature.clone()
        shifted.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info):
            raise RefluenceError(
                f"the damping {damping:.3g} is below the rounding of the sketched curvature, whose largest entry is "
                f"{float(self.curvature.abs().max()):.3g}: raise the smallest damping, lambda_exp_min"
            )
        return factor


def eigenvectors_pay(size: int, k: int, rows: int, dampings: int) -> bool:
    """Whether one eigendecomposition is less work than a Cholesky factor for each damping, counted in multiply-adds."""
    cholesky = size**3 / 3
    by_factors = dampings * (cholesky + size**2 * k)
    return EIGENVECTORS_WORK * cholesky + size**2 * (k + rows) < by_factors
