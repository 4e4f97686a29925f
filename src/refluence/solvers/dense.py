"""The exact primal solver."""

from __future__ import annotations

from dataclasses import dataclass

from refluence.curvature import EmpiricalFisher
from refluence.solvers.primal import GradientFeatures, PrimalState


@dataclass(frozen=True)
class Dense:
    """Exact, through the d×d curvature in float64, for models of a few thousand parameters.

    Costs n·d² + d³/3 multiply-adds and 16 d² bytes, of each block.
    """

    def prepare(self, curvature: EmpiricalFisher) -> PrimalState:
        """Form the curvature."""
        return PrimalState(GradientFeatures(curvature.rows), curvature.dimensions, curvature.weights)
