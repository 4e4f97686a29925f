"""Gradients and curvatures of every block under a sketch of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.curvature import Curvature, OuterCurvature
from refluence.gradients.blocks import accumulation_dtype
from refluence.gradients.rows import GradientRows
from refluence.sketches import Sketch
from refluence.store.held import Report

S = TypeVar("S", bound=Sketch)

LIFTED_ROWS = 256
PANEL = 256


def project_rows(rows: GradientRows, sketches: dict[str, Sketch]) -> dict[str, Float[Tensor, "n m"]]:
    """Block → projected gradients, in the gradients' dtype."""
    out = {
        group: torch.empty(rows.n, sketch.m, dtype=accumulation_dtype(rows.dtype), device=rows.device)
        for group, sketch in sketches.items()
    }
    for start, blocks in rows:
        for group, block in blocks.items():
            out[group][start : start + block.n] = block.sketch(sketches[group])
    return out


def project_train_rows(
    rows: GradientRows, sketch: Sketch, sketches: dict[str, Sketch], part: str
) -> tuple[dict[str, Float[Tensor, "n m"]], Report | None]:
    """Block → projected train gradients, held and stored as the run asks, and what its store did, where there is one.

    Args:
        sketch: from which those of the blocks come.
        part: of the store, for one of several sketches.
    """
    if rows.keeping is None:
        return project_rows(rows, sketches), None
    return rows.keeping.project(rows, sketch, sketches, part)


def second_moment(rows: Float[Tensor, "b m"], weights: Tensor | None) -> Float[Tensor, "m m"]:
    """Σ w r rᵀ, by panels of columns and its transpose: little over half the work of the whole product."""
    weighted = rows if weights is None else rows * weights.to(rows.device)[:, None]
    out = torch.empty(rows.shape[1], rows.shape[1], dtype=rows.dtype, device=rows.device)
    for first in range(0, rows.shape[1], PANEL):
        last = min(first + PANEL, rows.shape[1])
        torch.matmul(rows[:, :last].T, weighted[:, first:last], out=out[:last, first:last])
        out[first:last, :first] = out[:first, first:last].T
    return out


def sketched_curvature(curvature: Curvature, sketches: dict[str, Sketch]) -> dict[str, Float[Tensor, "m m"]]:
    """Block → P C Pᵀ."""
    found: dict[str, Tensor] = {}
    if isinstance(curvature, OuterCurvature):
        # Sketches know their layers by `on`, and each part has the same ones.
        sums = curvature.total(_sketched_moments, sketches)
        return {block: total.to(curvature.device).div_(curvature.n) for block, total in sums.items()}
    for block, sketch in sketches.items():
        d = curvature.dimensions[block]
        apply = curvature.operator(block)
        matrix = torch.empty(sketch.m, sketch.m, dtype=torch.float64, device=curvature.device)
        for first in range(0, sketch.m, LIFTED_ROWS):
            last = min(first + LIFTED_ROWS, sketch.m)
            unit = torch.zeros(sketch.m, last - first, dtype=torch.float64, device=curvature.device)
            unit[range(first, last), range(last - first)] = 1.0
            matrix[first:last] = sketch.project(apply(sketch.lift(unit, d)).T)
        found[block] = (matrix + matrix.T) / 2
    return found


def _sketched_moments(part: OuterCurvature, sketches: dict[str, Sketch]) -> dict[str, Float[Tensor, "m m"]]:
    """Block → Σ w (Pf)(Pf)ᵀ over the rows f."""
    found: dict[str, Tensor] = {}
    for start, blocks in part.features:
        for block, rows in blocks.items():
            projected = rows.sketch(sketches[block]).double()
            moment = second_moment(projected, part.feature_weights(start, rows.n))
            found[block] = found[block].add_(moment) if block in found else moment
    return found


def curvature_sketches(sketch: Sketch, curvature: Curvature) -> dict[str, Sketch]:
    """Block → its sketch, which knows the block's layers.

    Raises:
        PlanError: layers that the sketch cannot take.
    """
    sketches = block_sketches(sketch, curvature.groups)
    return {block: own.on(curvature.rows.matrices(block)) for block, own in sketches.items()}


def block_sketches(sketch: S, groups: Sequence[str]) -> dict[str, S]:
    """A sketch for each block, independent of the others and of other seeds' ones; a single block has `sketch`."""
    if len(groups) == 1:
        return {groups[0]: sketch}
    digests = {group: hashlib.sha256(f"{sketch.seed}:{group}".encode()).digest() for group in groups}
    return {group: sketch.reseeded(int.from_bytes(digest[:7], "big")) for group, digest in digests.items()}
