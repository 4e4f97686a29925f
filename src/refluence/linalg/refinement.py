"""Solves in float32 corrected by residuals measured in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from refluence.linalg.columns import IMPROVEMENT, ColumnSolution, OnStep
from refluence.linalg.maps import Apply

ROUND_RTOL = 1e-5
"""The most that a round in float32 reduces a residual: beyond it, its own rounding would be at work."""

ROUND_GAIN = 0.01
"""A round in float32 that leaves more than this share of a residual has a matrix too ill-conditioned for float32."""

ROUND_SHARE = 4
"""A round in float32 takes at most one in so many of all steps, lest it wander in its rounding."""

SINGLE_RTOL = 1e-4
"""The smallest tolerance for which a recursion in float32 may do, if its residuals are seen to be true."""

SPOT_CHECKS = 8
"""Columns whose residual is measured in float64 to see how far the recursion's are off."""

MARGIN = {torch.float32: 0.5, torch.float64: 0.99}
"""The share of the tolerance that a round aims at, so that its own residual may be off by the rest."""


def refined_solve(
    method: Callable[..., ColumnSolution],
    apply: Apply,
    right: Float64[Tensor, "d k"],
    rtol: float,
    atol: float,
    maxiter: int,
    precondition: Apply | None = None,
    on_step: OnStep | None = None,
) -> ColumnSolution:
    """A⁻¹B by rounds of `method` on the residual of what was found, in float32, with residuals in float64.

    For a tolerance of 1e-4 or more the residuals are those of the float32 recursion, and the true ones are measured in
    float64 for a few columns spread over all: twice the largest difference is added to every one. Only where that is
    too much, rounds follow in which every column is measured.

    A round in float32 that gains too little is followed by rounds in float64. A column that one of those does not halve
    is given back as it is, with `converged` False.

    Args:
        method: `conjugate_gradient` or `block_conjugate_gradient`.
        apply: V ↦ A V, in the dtype of V.
        right: B.
        rtol: as in `method`.
        atol: as in `method`.
        maxiter: the most steps of all rounds together.
        precondition: as in `method`, in the dtype of its argument.
        on_step: as in `method`, counting steps over the rounds.

    Source: Wilkinson's iterative refinement; Higham, Accuracy and Stability of Numerical Algorithms (2002), chapter 12.
    """
    system = _Refined(apply, right)
    target = (atol / system.unit).clamp_min(rtol)
    left = (system.size > target).nonzero()[:, 0]
    loose = bool((target >= SINGLE_RTOL).all())
    dtype, steps = torch.float32, 0
    while left.numel() and steps < maxiter:
        # In units of what is wanted of each column, one absolute tolerance serves all.
        size = system.size[left]
        scale = torch.maximum(target[left], torch.finfo(torch.float64).eps * size)
        single = dtype == torch.float32

        def report(step: int, largest: float, before: int = steps, start: float = float(size.max())) -> None:
            if on_step is not None:
                on_step(before + step, largest * start)

        found = method(
            apply,
            (system.residual[:, left] / scale).to(dtype),
            ROUND_RTOL if single and not loose else 0.0,
            MARGIN[dtype],
            min(maxiter - steps, -(-maxiter // ROUND_SHARE)) if single else maxiter - steps,
            precondition,
            report,
            measured=False,
        )
        moved = system.value[:, left] + found.value.double() * scale
        system.iterations[left] += found.iterations
        steps += max(1, int(found.iterations.max()))
        claimed = found.residual.double() * size
        if loose:
            claimed += 2 * system.off(left, moved, claimed)
            if bool((claimed <= target[left]).all()):
                system.value[:, left], system.size[left] = moved, claimed
                break
            loose = False
        gain = system.take(left, moved)
        unmet = system.size[left] > target[left]
        if dtype == torch.float64:
            unmet &= gain <= IMPROVEMENT
        elif bool((unmet & (gain > ROUND_GAIN)).any()):
            dtype = torch.float64
        left = left[unmet]
    return ColumnSolution(system.value * system.unit, system.size, system.iterations, system.size <= target)


class _Refined:
    """Right-hand sides of length one, and for each the best that was found, with its true residual."""

    def __init__(self, apply: Apply, right: Float64[Tensor, "d k"]) -> None:
        lengths = torch.linalg.vector_norm(right, dim=0)
        self.apply = apply
        self.unit = torch.where(lengths > 0, lengths, 1.0)
        self.right = right / self.unit
        self.size = (lengths > 0).double()
        self.value, self.residual = torch.zeros_like(right), self.right.clone()
        self.iterations = torch.zeros(lengths.shape, dtype=torch.int64, device=right.device)

    def off(self, columns: Int64[Tensor, " c"], moved: Float64[Tensor, "d c"], claimed: Float64[Tensor, " c"]) -> float:
        """How far the claimed residuals of a few columns spread over all are from the true ones, at most."""
        some = torch.linspace(0, len(columns) - 1, min(len(columns), SPOT_CHECKS)).round().long().unique()
        some = some.to(columns.device)
        remaining = self.right[:, columns[some]] - self.apply(moved[:, some])
        return float((torch.linalg.vector_norm(remaining, dim=0) - claimed[some]).abs().max())

    def take(self, columns: Int64[Tensor, " c"], moved: Float64[Tensor, "d c"]) -> Float64[Tensor, " c"]:
        """Keep what has a smaller residual than before; the residuals over those before."""
        remaining = self.right[:, columns] - self.apply(moved)
        sizes = torch.linalg.vector_norm(remaining, dim=0)
        gain = sizes / self.size[columns]
        better = gain < 1
        kept = columns[better]
        self.value[:, kept], self.residual[:, kept] = moved[:, better], remaining[:, better]
        self.size[kept] = sizes[better]
        return gain
