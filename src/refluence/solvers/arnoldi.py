"""The eigenpairs of largest magnitude of the curvature, by a Krylov method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from refluence.curvature import Curvature
from refluence.errors import PlanError
from refluence.gradients.blocks import accumulation_dtype
from refluence.linalg import ritz_steps, run_together
from refluence.linalg.lanczos import BLOCK
from refluence.solvers.cost import Cost, Workload
from refluence.solvers.low_rank import Eigenpairs, LowRankState, exported_pairs, low_rank_cost, refuse_rank


@dataclass(frozen=True)
class Arnoldi:
    """C ≈ U diag(s) Uᵀ of the `rank` eigenpairs of largest |s|, for each block, by thick-restarted block Lanczos.

    Works on any curvature; s + μ < 0 is used as it is, with a warning. Schioppa, Zablotskaia, Vilar & Sokolov 2022
    (AAAI, arXiv 2112.03052) keep the projection U diag(1/(s+μ)) Uᵀ alone (`complement=False`).

    Args:
        rank: of each block; at most its number of parameters is used.
        tolerance: Ritz residual wanted, relative to the largest |s|; an eigenvalue is then off by its square over the
            gap.
        complement: whether what lies outside the span of U is kept, divided by μ (Woodbury), or dropped.
        products: most products with C for each block; 10 times the Krylov space's size by default. `diagnostics` has
            the residuals reached.
        seed: of the starting vectors.

    Raises:
        PlanError: a rank below 1 or a tolerance that is not positive.
    """

    rank: int
    tolerance: float = 1e-3
    complement: bool = True
    products: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_rank(self.rank, "Arnoldi")
        if not self.tolerance > 0:
            raise PlanError(f"the tolerance of Arnoldi must be > 0, not {self.tolerance}")

    @property
    def singular(self) -> bool:
        """Whether solutions lie in a subspace, so that it cannot precondition."""
        return not self.complement

    def prepare(self, curvature: Curvature) -> LowRankState:
        """Find the pairs of all blocks together."""
        dtype, device = accumulation_dtype(curvature.dtype), curvature.device
        found = run_together(
            {
                block: ritz_steps(d, self.rank, self.seed, self.tolerance, None, self.products, BLOCK, dtype, device)
                for block, d in curvature.dimensions.items()
            },
            curvature.matvec,
        )
        pairs = {block: Eigenpairs(p.vectors, p.values, p.residuals) for block, p in found.items()}
        state = LowRankState(curvature, pairs, self.complement)
        state.diagnostics["products"] = {block: pair.products for block, pair in found.items()}
        return state

    def restore(self, curvature: Curvature, tensors: dict[str, Tensor]) -> LowRankState:
        """The state of what `export` gave."""
        return LowRankState(curvature, exported_pairs(tensors), self.complement)

    def cost(self, w: Workload) -> Cost:
        """Some twice the Krylov space's products where the spectrum falls fast, and their orthogonalisation."""
        krylov = 2 * (self.rank + BLOCK)
        return low_rank_cost(w, self.rank, columns=2 * krylov, vectors=krylov, passes=2.0 * krylov / BLOCK)
