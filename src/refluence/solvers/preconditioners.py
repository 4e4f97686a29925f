"""Preconditioners of `ConjugateGradient`: fixed positive maps near (C + μI)⁻¹."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.curvature import Curvature, Vectors
from refluence.errors import PlanError
from refluence.linalg import hutchinson_diagonal, nystroem_approximation
from refluence.solvers.cost import Cost, Workload
from refluence.solvers.state import Shifts, Solution


@runtime_checkable
class Preconditioner(Protocol):
    """What `ConjugateGradient` needs of one: those here, and every solver whose solution is linear in v."""

    def prepare(self, curvature: Curvature) -> Any:
        """A state with `solve(vectors, shifts) -> Solution` and `export()`."""
        ...

    def restore(self, curvature: Curvature, tensors: dict[str, Tensor]) -> Any:
        """The state of `export()`."""
        ...

    def cost(self, w: Workload) -> Cost:
        """Counted multiply-adds and bytes of the preparation."""
        ...


class PreconditionerState(ABC):
    """A prepared preconditioner."""

    @abstractmethod
    def solve(self, vectors: Vectors, shifts: Shifts) -> Solution:
        """Block → P⁻¹V_b, in the dtype of V_b."""

    @abstractmethod
    def export(self) -> dict[str, Tensor]:
        """What `restore` needs."""


@dataclass(frozen=True)
class Jacobi:
    """P = |diag C| + μ.

    Helps where parameters differ in scale, not where the damping already levels them.

    Args:
        probes: None takes the diagonal from the curvature, exactly; a number estimates it by so many products with
            random signs, where the exact one is dear (the Hessian).
        seed: of the signs.
    """

    probes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.probes is not None and self.probes < 1:
            raise PlanError(
                f"Jacobi(probes={self.probes}): at least one probe is needed, or None for the exact diagonal"
            )

    def cost(self, w: Workload) -> Cost:
        """One pass, or the probes' products."""
        work = float(w.n * w.d) if self.probes is None else self.probes * w.product_work
        return Cost(fixed=8.0 * w.d, kept=0.0, work=work)

    def prepare(self, curvature: Curvature) -> JacobiState:
        """Find the diagonal."""
        if self.probes is None:
            return JacobiState(curvature.diagonal())
        return JacobiState(
            {
                block: hutchinson_diagonal(
                    curvature.operator(block), d, self.probes, self.seed, product_dtype(curvature), curvature.device
                )[0]
                for block, d in curvature.dimensions.items()
            }
        )

    def restore(self, curvature: Curvature, tensors: dict[str, Tensor]) -> JacobiState:
        """The state of `export()`."""
        return JacobiState({block: tensors[f"diagonal.{block}"].to(curvature.device) for block in curvature.groups})


class JacobiState(PreconditionerState):
    """The diagonal of each block."""

    def __init__(self, diagonals: dict[str, Float[Tensor, " d"]]) -> None:
        self.diagonals = diagonals

    def solve(self, vectors: Vectors, shifts: Shifts) -> Solution:
        """V / (|diag C| + μ)."""
        values = {}
        for block, v in vectors.items():
            diagonal = self.diagonals[block].abs() + shifts[block]
            # A zero has no scale of its own: it takes the smallest there is.
            least = diagonal[diagonal > 0].min() if bool((diagonal > 0).any()) else torch.ones_like(diagonal[0])
            values[block] = v / diagonal.clamp_min(least).to(v.dtype)[:, None]
        return Solution(values)

    def export(self) -> dict[str, Tensor]:
        """The diagonals."""
        return {f"diagonal.{block}": diagonal for block, diagonal in self.diagonals.items()}


@dataclass(frozen=True)
class Nystroem:
    """P⁻¹ = U(Λ + μI)⁻¹Uᵀ + (I − UUᵀ)/(λ_r + μ), with UΛUᵀ ≈ C of rank r and λ_r its last eigenvalue.

    The damped curvature keeps a condition number of about (λ_r + μ)/μ, so r = 2 d_μ, twice the effective dimension,
    leaves a constant. One product with r columns and 2dr multiply-adds for each application.

    Source: Frangella, Tropp & Udell (2023), Randomized Nyström Preconditioning, SIAM J. Matrix Anal. Appl., eq. (1.3),
    up to a factor that makes blocks of different scale one system.

    Args:
        rank: r, of each block.
        seed: of the random test matrix.
    """

    rank: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise PlanError(f"the Nyström preconditioner's rank must be at least 1, not {self.rank}")

    def cost(self, w: Workload) -> Cost:
        """A product with `rank` columns and their orthonormalisation."""
        values = float(w.d * self.rank)
        return Cost(fixed=4.0 * w.itemsize * values, kept=0.0, work=self.rank * (w.product_work + 6 * values))

    def prepare(self, curvature: Curvature) -> NystroemPreconditionerState:
        """Approximate each block."""
        if not curvature.positive:
            raise PlanError(
                f'the Nyström preconditioner needs a positive curvature, such as "ggn" or "fisher", not '
                f"{curvature.name!r}: use preconditioners.Jacobi or none"
            )
        factors = {
            block: nystroem_approximation(
                curvature.operator(block),
                d,
                min(self.rank, d),
                self.seed,
                product_dtype(curvature),
                curvature.device,
            )
            for block, d in curvature.dimensions.items()
        }
        return NystroemPreconditionerState(factors)

    def restore(self, curvature: Curvature, tensors: dict[str, Tensor]) -> NystroemPreconditionerState:
        """The state of `export()`."""
        device = curvature.device
        return NystroemPreconditionerState(
            {
                block: (tensors[f"vectors.{block}"].to(device), tensors[f"eigenvalues.{block}"].to(device))
                for block in curvature.groups
            }
        )


class NystroemPreconditionerState(PreconditionerState):
    """Eigenpairs of an approximation of each block."""

    def __init__(self, factors: dict[str, tuple[Float[Tensor, "d r"], Float[Tensor, " r"]]]) -> None:
        self.factors = factors

    def solve(self, vectors: Vectors, shifts: Shifts) -> Solution:
        """(V + U((λ_r+μ)/(Λ+μ) − 1)UᵀV)/(λ_r + μ)."""
        values = {}
        for block, v in vectors.items():
            basis, eigenvalues = self.factors[block]
            level = float(eigenvalues[-1]) + shifts[block]
            if level <= 0:  # C has rank below r and there is no damping: any level is as good
                positive = eigenvalues[eigenvalues > 0]
                level = float(positive.min()) if positive.numel() else 1.0
            gains = level / (eigenvalues.double() + shifts[block]).clamp_min(level) - 1
            basis = basis.to(v.dtype)
            inside = gains.to(v.dtype)[:, None] * (basis.T @ v)
            values[block] = torch.addmm(v.T, inside.T, basis.T).T / level
        return Solution(values)

    def export(self) -> dict[str, Tensor]:
        """The eigenpairs."""
        tensors = {}
        for block, (basis, eigenvalues) in self.factors.items():
            tensors[f"vectors.{block}"], tensors[f"eigenvalues.{block}"] = basis, eigenvalues
        return tensors


def product_dtype(curvature: Curvature) -> torch.dtype:
    """float64 where the gradients are, else float32."""
    return torch.float64 if curvature.dtype == torch.float64 else torch.float32
