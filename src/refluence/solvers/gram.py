"""The exact dual solver."""

from __future__ import annotations

from dataclasses import dataclass

from refluence.curvature import EmpiricalFisher
from refluence.solvers.dual import DualState, GradientKernel


@dataclass(frozen=True)
class Gram:
    """Exact, through the n×n Gram matrix of the gradients, whatever their length.

    Costs n²·(arithmetic of one inner product) + n³/3 multiply-adds and 16 n² bytes; for layers that see one position an
    example an inner product costs d_in + d_out, not d_in·d_out.
    """

    def prepare(self, curvature: EmpiricalFisher) -> DualState:
        """Form the Gram matrices."""
        return DualState(GradientKernel(curvature.rows), curvature.dimensions, curvature.weights)
