"""Solves in float32 corrected by residuals measured in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float64
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
    lengths = torch.linalg.vector_norm(right, dim=0)
    used = lengths > 0
    unit = torch.where(used, lengths, 1.0)
    target = (atol / unit).clamp_min(rtol)
    size = used.double()
    if bool((target >= SINGLE_RTOL).all()) and bool(used.any()):
        found = _single(method, apply, right, unit, target, maxiter, precondition, on_step)
        if bool(found.converged.all()):
            return found
    value, residual = torch.zeros_like(right), right / unit
    iterations = torch.zeros(lengths.shape, dtype=torch.int64, device=right.device)
    left = (size > target).nonzero()[:, 0]
    dtype, steps = torch.float32, 0
    while left.numel() and steps < maxiter:
        # In units of what is wanted of each column, one absolute tolerance serves all.
        scale = torch.maximum(target[left], torch.finfo(torch.float64).eps * size[left])

        def report(step: int, largest: float, before: int = steps, start: float = float(size[left].max())) -> None:
            if on_step is not None:
                on_step(before + step, largest * start)

        found = method(
            apply,
            (residual[:, left] / scale).to(dtype),
            ROUND_RTOL if dtype == torch.float32 else 0.0,
            MARGIN[dtype],
            min(maxiter - steps, -(-maxiter // ROUND_SHARE)) if dtype == torch.float32 else maxiter - steps,
            precondition,
            report,
            measured=False,
        )
        moved = value[:, left] + found.value.double() * scale
        remaining = right[:, left] / unit[left] - apply(moved)
        sizes = torch.linalg.vector_norm(remaining, dim=0)
        better = sizes < size[left]
        gained = sizes <= (ROUND_GAIN if dtype == torch.float32 else IMPROVEMENT) * size[left]
        columns = left[better]
        value[:, columns], residual[:, columns], size[columns] = moved[:, better], remaining[:, better], sizes[better]
        iterations[left] += found.iterations
        steps += max(1, int(found.iterations.max()))
        unmet = size[left] > target[left]
        if dtype == torch.float64:
            unmet &= gained
        elif bool((unmet & ~gained).any()):
            dtype = torch.float64
        left = left[unmet]
    return ColumnSolution(value * unit, size, iterations, size <= target)


def _single(
    method: Callable[..., ColumnSolution],
    apply: Apply,
    right: Float64[Tensor, "d k"],
    unit: Float64[Tensor, " k"],
    target: Float64[Tensor, " k"],
    maxiter: int,
    precondition: Apply | None,
    on_step: OnStep | None,
) -> ColumnSolution:
    """One solve in float32, with the residuals of its recursion and what the checked columns show them to be off."""
    scale = unit * target
    scaled = (right / scale).float()
    found = method(apply, scaled, 0.0, MARGIN[torch.float32], maxiter, precondition, on_step, measured=False)
    k = right.shape[1]
    some = torch.linspace(0, k - 1, min(k, SPOT_CHECKS), device=right.device).round().long().unique()
    value = found.value[:, some].double() * scale[some]
    true = torch.linalg.vector_norm(right[:, some] - apply(value), dim=0) / unit[some]
    off = float((true - found.residual[some].double()).abs().max())
    residual = found.residual.double() + 2 * off * (found.residual > 0)
    return ColumnSolution(found.value.double().mul_(scale), residual, found.iterations, residual <= target)
