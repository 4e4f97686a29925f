"""Inverses by conjugate gradients."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.curvature import Curvature, Vectors
from refluence.errors import PlanError, SolverError
from refluence.linalg import ColumnSolution, block_conjugate_gradient, conjugate_gradient
from refluence.linalg.refinement import refined_solve
from refluence.solvers.convergence import ConvergenceBar
from refluence.solvers.cost import Cost, Workload
from refluence.solvers.joint import JointSystem
from refluence.solvers.preconditioners import Preconditioner
from refluence.solvers.state import CHUNK_BYTES, OperatorState, Shifts, Solution

TILE_BYTES = 4 << 30
"""Memory for the right-hand sides that are solved for together."""

ENTRY_BYTES = 64
"""Bytes of an entry: right-hand side, solution and residual in float64, and the recursion's five arrays."""


ASSUMED_STEPS = 60
"""Steps that a plan counts with."""

SINGULAR_RESIDUAL = 1e-3
"""A residual that stays above it at damping 0 is what a right-hand side has outside the range of the curvature."""

BLOCK_PRODUCTS = 8
"""Products of k×k with k×d in a step of the block recurrence."""


@dataclass(frozen=True)
class ConjugateGradient:
    """(C + μI)s = v for all right-hand sides together, to a tolerance on the true residual; C + μI must be positive.

    One pass over the data for each step. Where the gradients are float32 so are the products, and the residual is
    measured and corrected in float64.

    Args:
        rtol: a column is done at ‖(C+μ)s − v‖ ≤ max(rtol‖v‖, atol), the norm over all blocks together. The error of s
            in the norm of the damped curvature is then at most √κ·rtol of its own, κ = (λ_max + μ)/μ: 1e-6 keeps it
            below a thousandth for κ up to a million.
        atol: see rtol; in units of the gradients.
        maxiter: the most steps; a column that needs more is reported by a warning with its residual.
        preconditioner: `rf.solvers.preconditioners.Jacobi()`, `Nystroem(rank)`, or any solver whose solution is linear
            in v, such as `rf.solvers.Ekfac()`.
        block: all columns search one space (far fewer steps for many right-hand sides); False: each its own.

    Sources: Hestenes & Stiefel (1952); block: Ji & Li, BIT 57 (2017).
    """

    rtol: float = 1e-6
    atol: float = 0.0
    maxiter: int = 1000
    preconditioner: Preconditioner | None = None
    block: bool = True

    iterative: ClassVar[bool] = True
    """Whether the solution depends on v otherwise than linearly, so that it cannot precondition."""

    def __post_init__(self) -> None:
        if not 0 <= self.rtol < 1 or self.atol < 0 or max(self.rtol, self.atol) == 0:
            raise PlanError(
                f"ConjugateGradient(rtol={self.rtol}, atol={self.atol}): rtol must lie in [0, 1), atol must not be "
                "negative, and one of them must be positive"
            )
        if self.maxiter < 1:
            raise PlanError(f"ConjugateGradient(maxiter={self.maxiter}): at least one step is needed")
        if self.preconditioner is None:
            return
        if not isinstance(self.preconditioner, Preconditioner):
            raise PlanError(
                f"{self.preconditioner!r} is no preconditioner: use rf.solvers.preconditioners.Jacobi(), "
                "Nystroem(rank), or a solver such as rf.solvers.Ekfac()"
            )
        if getattr(self.preconditioner, "singular", False):
            raise PlanError(
                f"{type(self.preconditioner).__name__} cannot precondition conjugate gradients: as it is set, its map "
                "is singular, zero on most directions. Use preconditioners.Nystroem(rank), a sketch of the curvature "
                "that keeps the complement"
            )
        if getattr(self.preconditioner, "iterative", False):
            raise PlanError(
                f"{type(self.preconditioner).__name__} cannot precondition conjugate gradients: its answer is not a "
                "fixed linear map of v. Use preconditioners.Nystroem(rank), or a solver such as Ekfac or Arnoldi"
            )

    def cost(self, w: Workload) -> Cost:
        """Counted for `ASSUMED_STEPS` steps: their number depends on the spectrum, which a plan does not know."""
        tile = max(1, min(TILE_BYTES // (ENTRY_BYTES * w.d), CHUNK_BYTES // (8 * w.d)))
        columns = min(w.tests, tile)
        step = w.product_work + (BLOCK_PRODUCTS * columns * w.d if self.block else 0.0)
        own = Cost(
            fixed=float(ENTRY_BYTES * columns * w.d) + w.score_bytes,
            kept=w.n * (w.bytes_per_row + w.feature_bytes_per_row),
            work=w.tests * ASSUMED_STEPS * step + w.dot_work,
            passes=1.0 + ASSUMED_STEPS * -(-w.tests // tile),
        )
        if self.preconditioner is None:
            return own
        other = self.preconditioner.cost(w)
        return Cost(
            own.fixed + other.fixed,
            max(own.kept, other.kept),
            own.work + other.work,
            own.passes + other.passes,
            other.tiled,
            other.why_not,
        )

    def prepare(self, curvature: Curvature) -> ConjugateGradientState:
        """Prepare the preconditioner."""
        prepared = None if self.preconditioner is None else self.preconditioner.prepare(curvature)
        return ConjugateGradientState(curvature, self, prepared)

    def restore(self, curvature: Curvature, tensors: dict[str, Tensor]) -> ConjugateGradientState:
        """The state of `export()`, without preparing the preconditioner again."""
        prepared = None if self.preconditioner is None else self.preconditioner.restore(curvature, tensors)
        return ConjugateGradientState(curvature, self, prepared)


class ConjugateGradientState(OperatorState):
    """A solver with its prepared preconditioner; the blocks are one system on their concatenation."""

    def __init__(self, curvature: Curvature, solver: ConjugateGradient, preconditioner: Any) -> None:
        super().__init__(curvature)
        self.solver, self.preconditioner = solver, preconditioner
        name = None if solver.preconditioner is None else type(solver.preconditioner).__name__
        self.diagnostics.update(method="block" if solver.block else "columns", preconditioner=name)

    @property
    def product_dtype(self) -> torch.dtype:
        """The gradients' dtype: its rounding is far below any tolerance of the solve."""
        return self.curvature.dtype

    def export(self) -> dict[str, Tensor]:
        """The preconditioner's tensors."""
        return {} if self.preconditioner is None else dict(self.preconditioner.export())

    def solve(self, vectors: Vectors, shifts: Shifts) -> Solution:
        """Block → (C_b+μ_bI)⁻¹ V_b in float64.

        Raises:
            SolverError: negative curvature, with the damping that is needed at least; no damping of a singular one.
        """
        system = JointSystem(
            self.curvature, self.preconditioner, {block: v.shape[0] for block, v in vectors.items()}, shifts
        )
        k = next(iter(vectors.values())).shape[1]
        tile = max(1, TILE_BYTES // (ENTRY_BYTES * sum(system.sizes.values())))
        values = {b: torch.empty(k, v.shape[0], dtype=torch.float64, device=v.device).T for b, v in vectors.items()}
        parts = []
        for start in range(0, k, tile):
            here = slice(start, min(start + tile, k))
            found = self._solve_tile(system, system.join({b: v[:, here].double() for b, v in vectors.items()}))
            for block, value in system.split(found.value).items():
                values[block][:, here] = value
            parts.append((found.residual, found.iterations, found.converged))
        device = self.curvature.device
        empty = torch.zeros(0, device=device)
        parts = parts or [(empty.double(), empty.long(), empty.bool())]
        residual, iterations, converged = (torch.cat(part) for part in zip(*parts, strict=True))
        self.diagnostics.update(
            residual=residual.tolist(),
            iterations=iterations.tolist(),
            converged=int(converged.sum()),
            products=system.products,
        )
        if not bool(converged.all()):
            self._refuse_singular(residual, converged, shifts)
            self._warn(residual, iterations, converged)
        return Solution(values, residual, iterations, converged)

    def _solve_tile(self, system: JointSystem, right: Float[Tensor, "d k"]) -> ColumnSolution:
        solver = self.solver
        method = block_conjugate_gradient if solver.block else conjugate_gradient
        precondition = None if self.preconditioner is None else system.precondition
        with ConvergenceBar("conjugate gradients", solver.rtol, self.curvature.rows.progress) as bar:
            if self.curvature.dtype == torch.float64:
                return method(system.apply, right, solver.rtol, solver.atol, solver.maxiter, precondition, bar.step)
            return refined_solve(
                method, system.apply, right, solver.rtol, solver.atol, solver.maxiter, precondition, bar.step
            )

    def _refuse_singular(self, residual: Tensor, converged: Tensor, shifts: Shifts) -> None:
        undamped = [block for block, shift in shifts.items() if shift == 0]
        largest = float(residual[~converged].max())
        if undamped and largest > SINGULAR_RESIDUAL:
            raise SolverError(
                f"conjugate gradients left a relative residual of {largest:.2g} at damping 0 of block {undamped[0]!r}: "
                "the curvature is singular, or too near to it, and has no inverse there: use a damping > 0"
            )

    def _warn(self, residual: Tensor, iterations: Tensor, converged: Tensor) -> None:
        unmet = ~converged
        stopped = bool((iterations[unmet] >= self.solver.maxiter).any())
        cause = f"stopped after maxiter={self.solver.maxiter} steps" if stopped else "met the rounding of the products"
        warnings.warn(
            f"conjugate gradients {cause}: {int(unmet.sum())} of {len(residual)} right-hand sides have a "
            f"relative residual above rtol={self.solver.rtol:g}, the largest {float(residual[unmet].max()):.2g}. "
            + ("Raise maxiter or the damping, or use a preconditioner" if stopped else "Raise rtol or the damping"),
            RuntimeWarning,
            stacklevel=3,
        )
