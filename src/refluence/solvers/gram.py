"""The exact dual solver."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from refluence.curvature import Curvature, OuterCurvature
from refluence.errors import PlanError
from refluence.solvers.cost import Cost, Workload
from refluence.solvers.dual import DualState, GramState, WoodburyState
from refluence.solvers.systems import exported_matrices


@dataclass(frozen=True)
class Gram:
    """Exact, through the N×N Gram matrix of the rows of the curvature, whatever their length.

    N = n·q: q = 1 for "fisher", the samples for "mc_fisher", the outputs for "ggn" and "true_fisher". Costs
    N²·(arithmetic of one inner product) + N³/3 multiply-adds and 16 N² bytes; for layers that see one position an
    example an inner product costs d_in + d_out, not d_in·d_out. For "mc_fisher" with two samples or more the scores
    have a standard error over the samples.
    """

    needs_rows = True

    def prepare(self, curvature: Curvature) -> GramState:
        """Form the Gram matrices.

        Raises:
            PlanError: a curvature that has no rows.
        """
        return self.restore(curvature, None)

    def restore(self, curvature: Curvature, tensors: dict[str, Tensor] | None) -> GramState:
        """The state from what it exported."""
        if not isinstance(curvature, OuterCurvature):
            raise PlanError(
                f'solver Gram needs the rows of a curvature, and "{curvature.name}" of this task has none that fit: '
                'use curvature "fisher", "mc_fisher", or "ggn" with few outputs; or solver ConjugateGradient or Dense'
            )
        matrices = None if tensors is None else exported_matrices(tensors)
        if curvature.own_rows:
            return DualState(curvature, matrices)
        return WoodburyState(curvature, matrices, curvature.q if curvature.name == "mc_fisher" else 0)

    def cost(self, w: Workload) -> Cost:
        """16 N² bytes and N³/3 multiply-adds a block, and as many inner products."""
        if w.q is None:
            return Cost.impossible(
                'the curvature has no rows that fit; curvature "fisher" and "mc_fisher" have, and solvers '
                "ConjugateGradient and Dense need none"
            )
        rows, blocks = w.n * w.q, len(w.dimensions)
        fixed = blocks * 16.0 * rows**2 + 8.0 * rows**2 + w.score_bytes + w.tests * w.bytes_per_row
        pairs = rows * (rows / 2 + w.tests + (w.n if w.q > 1 else 0))
        work = w.inner_product_work * pairs + blocks * (w.spectral * rows**3 / 3 + rows**2 * w.tests)
        return Cost(fixed, w.n * (w.bytes_per_row + w.feature_bytes_per_row), work, tiled=True)
