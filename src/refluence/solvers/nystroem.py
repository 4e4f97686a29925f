"""The randomised Nyström approximation of the curvature, with Woodbury."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from refluence.curvature import Curvature
from refluence.errors import PlanError
from refluence.gradients.blocks import accumulation_dtype
from refluence.linalg import nystroem_steps, run_together
from refluence.solvers.cost import Cost, Workload
from refluence.solvers.low_rank import Eigenpairs, LowRankState, exported_pairs, low_rank_cost, refuse_rank


@dataclass(frozen=True)
class Nystroem:
    """C ≈ CΩ(ΩᵀCΩ)⁺(CΩ)ᵀ of a random orthonormal Ω with `rank` columns, for each block; (C + μI)⁻¹ by Woodbury.

    One pass over the data with `rank` vectors makes it. It lies below C, so scores are damped a little less than they
    should be in the directions that it misses; exact where the rank of C is at most `rank`.
    Hataya & Yamada 2023 (AISTATS, arXiv 2302.09726); computed as in Frangella, Tropp & Udell 2023, Alg. 2.1.

    Args:
        rank: of each block; at most its number of parameters is used.
        seed: of Ω.

    Raises:
        PlanError: a rank below 1; in `prepare`, a curvature that may be indefinite.
    """

    rank: int
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_rank(self.rank, "Nystroem")

    def prepare(self, curvature: Curvature) -> LowRankState:
        """Multiply C with Ω."""
        if not curvature.positive:
            raise PlanError(
                f'Nystroem needs a curvature that is positive semi-definite, and "{curvature.name}" need not be: use '
                'curvature "ggn", "fisher", "true_fisher" or "mc_fisher", or solver Arnoldi'
            )
        dtype = accumulation_dtype(curvature.dtype)
        found = run_together(
            {
                b: nystroem_steps(d, self.rank, self.seed, dtype, curvature.device)
                for b, d in curvature.dimensions.items()
            },
            curvature.matvec,
        )
        return LowRankState(curvature, {block: Eigenpairs(*pair) for block, pair in found.items()})

    def restore(self, curvature: Curvature, tensors: dict[str, Tensor]) -> LowRankState:
        """The state of what `export` gave."""
        return LowRankState(curvature, exported_pairs(tensors))

    def cost(self, w: Workload) -> Cost:
        """`rank` products and a QR decomposition of d×rank."""
        return low_rank_cost(w, self.rank, columns=self.rank, vectors=3 * self.rank, passes=1)
