"""Solving A X = B for many columns by a recurrence: bookkeeping of each column, whatever the recurrence.

Inside, columns are the rows of contiguous (k, d) tensors, and every right-hand side has length one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from refluence.errors import SolverError
from refluence.linalg.maps import Apply

OnStep = Callable[[int, float], None]
"""Called after each step with its number and the largest relative residual of the columns still at work."""

IMPROVEMENT = 0.5
"""A restart from the true residual that does not bring it below this share of the last one has met the rounding."""

DROWNED = 0.1
"""Where ε‖A‖‖x‖ exceeds this share of ‖b‖, the rounding of Ax alone is as large as b: there is no such solution."""

NEGATIVE = 64.0
"""Curvature below −NEGATIVE·ε·(largest curvature seen) is negative; nearer to zero its sign is rounding."""

NORM_STRETCH = 4096


@dataclass(frozen=True)
class ColumnSolution:
    """X ≈ A⁻¹B; `residual` the true ‖b − Ax‖/‖b‖ (0 where b = 0), `iterations` each column's steps."""

    value: Float[Tensor, "d k"]
    residual: Float[Tensor, " k"]
    iterations: Int64[Tensor, " k"]
    converged: Bool[Tensor, " k"]


class Recurrence(ABC):
    """How the columns at work choose directions and step along them."""

    columns: Int64[Tensor, " a"]
    directions: Float[Tensor, "j d"]
    residual: Float[Tensor, "a d"]
    lingering: float = 1.0
    """A column that has converged stays, while others have not, until it is below this share of its target."""

    @abstractmethod
    def step(self, products: Float[Tensor, "j d"], value: Float[Tensor, "k d"]) -> Bool[Tensor, " a"]:
        """Step along the directions, given A times them; which columns met a direction without curvature."""

    @abstractmethod
    def select(self, keep: Bool[Tensor, " a"], joining: Int64[Tensor, " c"], residual: Float[Tensor, "c d"]) -> None:
        """Go on with the columns kept and those joining, in new directions."""


class System:
    """The right-hand sides, what has been found for each, and how well."""

    def __init__(self, right: Float[Tensor, "d k"], rtol: float, atol: float, measured: bool = True) -> None:
        if not (0 <= rtol < 1) or atol < 0:
            raise SolverError(f"rtol={rtol} must lie in [0, 1) and atol={atol} must not be negative")
        self.right, self.measured = right.T, measured
        k, device = self.right.shape[0], right.device
        # In two steps, so that no square overflows or vanishes.
        self.peak = self.right.abs().amax(dim=1) if right.numel() else torch.zeros(k, dtype=right.dtype, device=device)
        if not torch.isfinite(self.peak).all():
            column = int(torch.isfinite(self.peak).logical_not().nonzero()[0])
            raise SolverError(
                f"right-hand side {column} has NaN or Inf entries: the gradients it is made of are at fault"
            )
        self.used = self.peak > 0
        self.peak = torch.where(self.used, self.peak, torch.ones_like(self.peak))
        self.length = torch.ones(k, dtype=torch.float64, device=device)
        self.length = torch.where(self.used, norms(self.right / self.peak[:, None]), self.length)
        self.target = (atol / (self.length * self.peak.double())).clamp_min(rtol)
        self.value = torch.zeros(self.right.shape, dtype=right.dtype, device=device)
        self.iterations = torch.zeros(k, dtype=torch.int64, device=device)
        self.residual = self.used.double()
        self.converged = ~self.used
        self.hopeless = torch.zeros(k, dtype=torch.bool, device=device)
        self._checkpoints: dict[int, Tensor] = {}

    def unit(self, columns: Int64[Tensor, " c"]) -> Float[Tensor, "c d"]:
        """The right-hand sides, each of length one."""
        scaled = self.right[columns] / self.peak[columns, None]
        return scaled.div_(self.length[columns, None].to(scaled.dtype)).contiguous()

    def check(
        self, columns: Int64[Tensor, " c"], products: Float[Tensor, "c d"], last: bool
    ) -> tuple[Int64[Tensor, " c2"], Float[Tensor, "c2 d"]]:
        """The columns to go on with, from their true residual; the others end as the best of them that was measured."""
        residual = self.unit(columns) - products
        found = norms(residual)
        met = found <= self.target[columns]
        again = ~met & ~self.hopeless[columns] & (found < IMPROVEMENT * self.residual[columns]) & (not last)
        for i, column in enumerate(columns.tolist()):
            if again[i]:
                self._checkpoints[column] = self.value[column].clone()
            elif (column in self._checkpoints or self.hopeless[column]) and not found[i] <= self.residual[column]:
                self.value[column] = self._checkpoints.get(column, 0.0)
                found[i] = self.residual[column]
        self.residual[columns] = found
        self.converged[columns] = met
        return columns[again], residual[again]

    def solution(self) -> ColumnSolution:
        """What was found, in the scale of the right-hand sides."""
        value = self.value * self.length[:, None].to(self.value.dtype)
        return ColumnSolution(value.mul_(self.peak[:, None]).T, self.residual, self.iterations, self.converged)


def iterate(apply: Apply, system: System, recurrence: Recurrence, maxiter: int, on_step: OnStep | None) -> None:
    """Step until every column's true residual meets its target, stops improving, or `maxiter` steps are done.

    A column whose recursive residual claims convergence stands aside while its true residual is measured in the next
    step's product, so that checks cost no pass of their own.
    """
    claimed = torch.zeros(0, dtype=torch.int64, device=system.value.device)
    recurrence.select(claimed.bool(), system.used.nonzero()[:, 0], system.unit(system.used.nonzero()[:, 0]))
    steps = 0
    while recurrence.columns.numel() + claimed.numel() > 0:
        last = steps >= maxiter
        if last and not system.measured:
            return
        directions = recurrence.directions[:0] if last else recurrence.directions
        if last:
            claimed = torch.cat([claimed, recurrence.columns])
        wanted = torch.cat([directions, system.value[claimed]]) if claimed.numel() else directions
        products = apply(wanted.T).T if wanted.shape[0] else wanted
        if not torch.isfinite(products).all():
            raise SolverError(
                "a product with the curvature has NaN or Inf entries: use a wider dtype or a larger damping"
            )
        count = directions.shape[0]
        joining, residual = system.check(claimed, products[count:], last)
        if last:
            return
        columns = recurrence.columns
        stuck = recurrence.step(products[:count], system.value)
        system.iterations[columns] += 1
        system.hopeless[columns[stuck]] = True
        sizes = norms(recurrence.residual)
        met = stuck | (sizes <= system.target[columns])
        leaving = met if bool(met.all()) else stuck | (sizes <= recurrence.lingering * system.target[columns])
        if system.measured:
            claimed = columns[leaving]
        else:
            system.residual[columns], system.converged[columns] = sizes, met & ~stuck
        steps += bool(columns.numel())
        if on_step is not None and columns.numel():
            on_step(steps, float(sizes.max()))
        recurrence.select(~leaving, joining, residual)


def advance(
    value: Float[Tensor, "k d"], columns: Int64[Tensor, " a"], change: Float[Tensor, "a d"], rounding: float
) -> Bool[Tensor, " a"]:
    """Add the changes in place, but for those that lead out of what rounding lets be a solution; which those are."""
    moved = change.add_(value[columns])
    drowned = norms(moved) * rounding > DROWNED
    if bool(drowned.any()):
        moved[drowned] = value[columns[drowned]]
    value[columns] = moved
    return drowned


def rows_kept(rows: Tensor, keep: Bool[Tensor, " a"], joining: Tensor | None = None) -> Tensor:
    """The rows kept, with those joining below them; no copy where nothing changes."""
    kept = rows if bool(keep.all()) else rows[keep]
    return kept if joining is None or not joining.shape[0] else torch.cat([kept, joining])


def norms(rows: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
    """Length of each row; in float32 by stretches, whose squares are added in float64: a tenth of the time."""
    if rows.dtype == torch.float64 or rows.shape[1] <= NORM_STRETCH:
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    stretches = [torch.linalg.vector_norm(part, dim=1).double() for part in rows.split(NORM_STRETCH, dim=1)]
    return torch.linalg.vector_norm(torch.stack(stretches), dim=0)


def dots(left: Float[Tensor, "k d"], right: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
    """Inner products of rows, summed in float64."""
    return (left * right).sum(dim=1, dtype=torch.float64)


def slopes_along(residual: Float[Tensor, "k d"], towards: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
    """rᵀPr of each residual, which a preconditioner must keep positive."""
    slopes = dots(residual, towards)
    if not float(slopes.min()) > 0:
        raise SolverError(
            f"the preconditioner is not positive definite: rᵀPr = {float(slopes.min()):.3g} for a residual r; use "
            "another, or none"
        )
    return slopes


def refuse_negative(curvature: float) -> None:
    """The error for pᵀAp/pᵀp < 0."""
    raise SolverError(
        f"negative curvature: pᵀAp/pᵀp = {curvature:.3g} along a search direction p of A = C + damping, so conjugate "
        f"gradients cannot solve with A: raise the damping by more than {-curvature:.3g}, or use the curvature "
        '"ggn" or "fisher", which are positive'
    )
