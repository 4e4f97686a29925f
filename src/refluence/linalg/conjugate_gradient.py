"""Conjugate gradients, column by column in one product."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from refluence.linalg.columns import (
    NEGATIVE,
    ColumnSolution,
    OnStep,
    Recurrence,
    System,
    advance,
    dots,
    iterate,
    norms,
    refuse_negative,
    rows_kept,
    slopes_along,
)
from refluence.linalg.maps import Apply


def conjugate_gradient(
    apply: Apply,
    right: Float[Tensor, "d k"],
    rtol: float,
    atol: float,
    maxiter: int,
    precondition: Apply | None = None,
    on_step: OnStep | None = None,
    measured: bool = True,
) -> ColumnSolution:
    """A⁻¹B for a positive definite A, each column with its own step sizes, until ‖b − Ax‖ ≤ max(rtol‖b‖, atol).

    The criterion is on the true residual: the recursive one says when to look, and a column whose true residual
    disagrees restarts from it. A column that no longer improves (its tolerance lies below the rounding of its dtype, or
    it has no solution) is given back as it is, with `converged` False.

    Args:
        apply: V ↦ A V.
        right: B; zero columns give zero.
        rtol: relative tolerance of each column.
        atol: absolute tolerance of each column.
        maxiter: the most steps.
        precondition: a fixed symmetric positive definite map near A⁻¹.
        on_step: called with the step's number and the largest relative residual.
        measured: False believes the recursive residual, for a caller that measures the true one.

    Raises:
        SolverError: negative curvature, a product that is not finite, or a preconditioner that is not positive.

    Source: Hestenes & Stiefel (1952); Saad, Iterative Methods for Sparse Linear Systems (2003), algorithm 9.1.
    """
    system = System(right, rtol, atol, measured)
    iterate(apply, system, ColumnRecurrence(system.value, precondition), maxiter, on_step)
    return system.solution()


class ColumnRecurrence(Recurrence):
    """x += αp, r −= αAp, p = z + βp, with α = rᵀz/pᵀAp and β the ratio of rᵀz."""

    def __init__(self, value: Float[Tensor, "k d"], precondition: Apply | None) -> None:
        self.precondition = precondition
        self.columns: Int64[Tensor, " a"] = torch.zeros(0, dtype=torch.int64, device=value.device)
        self.directions = self.residual = value[:0]
        self._slopes = torch.zeros(0, dtype=torch.float64, device=value.device)
        self._largest = 0.0

    def step(self, products: Float[Tensor, "a d"], value: Float[Tensor, "k d"]) -> Bool[Tensor, " a"]:
        """One step of every column; those that met a direction without curvature stay where they are."""
        if not products.shape[0]:
            return torch.zeros(0, dtype=torch.bool, device=value.device)
        curvature = dots(self.directions, products)
        relative = curvature / norms(self.directions).square()
        self._largest = max(self._largest, float(relative.abs().max()))
        rounding = torch.finfo(value.dtype).eps * self._largest
        if float(relative.min()) < -NEGATIVE * rounding:
            refuse_negative(float(relative.min()))
        flat = relative <= rounding
        lengths = torch.where(flat, 0.0, self._slopes / curvature).to(value.dtype)[:, None]
        drowned = advance(value, self.columns, lengths * self.directions, rounding)
        self.residual = torch.addcmul(self.residual, lengths, products, value=-1)
        return flat | drowned

    def select(self, keep: Bool[Tensor, " a"], joining: Int64[Tensor, " c"], residual: Float[Tensor, "c d"]) -> None:
        """The next directions; a column that joins starts anew."""
        self.columns = rows_kept(self.columns, keep, joining)
        self.residual = rows_kept(self.residual, keep, residual)
        if not self.columns.numel():
            self.directions, self._slopes = self.residual, self._slopes[:0]
            return
        towards = self.residual if self.precondition is None else self.precondition(self.residual.T).T
        slopes = slopes_along(self.residual, towards)
        previous, count = rows_kept(self.directions, keep), int(keep.sum())
        ratios = (slopes[:count] / rows_kept(self._slopes, keep)).to(towards.dtype)[:, None]
        directions = towards.clone()
        directions[:count] += ratios * previous
        self.directions, self._slopes = directions, slopes
