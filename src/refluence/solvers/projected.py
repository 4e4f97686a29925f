"""Projected train gradients, here or in parts, and the passes over them that sketched scores take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from refluence.columns import ColumnSums
from refluence.curvature import Curvature
from refluence.gradients.parts import Pass, Tree
from refluence.sketches import Sketch
from refluence.solvers.projection import curvature_sketches, project_train_rows, second_moment
from refluence.solvers.psd import PositiveMatrix
from refluence.store.held import Report

CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Stretch:
    """Projected gradients of consecutive rows.

    Args:
        rows: block → (n, m), which may be held elsewhere than on `device`.
        weights: of these rows in the training objective; None: all 1.
        first: their first row in the training data.
        device: where products with them are made.
    """

    rows: dict[str, Float[Tensor, "n m"]]
    weights: Float[Tensor, " n"] | None
    first: int
    device: torch.device

    def chunks(self, block: str) -> Iterator[tuple[int, Float[Tensor, "b m"]]]:
        """(first row here, rows on the device), some at a time."""
        for start in range(0, len(self.rows[block]), CHUNK_ROWS):
            yield start, self.rows[block][start : start + CHUNK_ROWS].to(self.device)

    def weights_of(self, start: int, rows: Float[Tensor, "b m"]) -> Float64[Tensor, "b 1"] | None:
        """w of a chunk, as a column."""
        if self.weights is None:
            return None
        return self.weights[start : start + len(rows), None].to(device=self.device, dtype=torch.float64)


class Projected(ABC):
    """Block → (n, m) projected train gradients. A pass takes a `Stretch` of them."""

    @abstractmethod
    def total(self, function: Pass, *given: Any) -> Tree:
        """The sum of a pass over the rows."""

    @abstractmethod
    def by_row(self, function: Pass, *given: Any) -> Tree:
        """What a pass gives for each row."""

    @abstractmethod
    def rows(self) -> dict[str, Float[Tensor, "n m"]]:
        """All of them, here."""


class ProjectedHere(Projected):
    """Those that this process holds.

    Args:
        rows: block → (n, m).
        curvature: of the same examples.
    """

    def __init__(self, rows: dict[str, Float[Tensor, "n m"]], curvature: Curvature) -> None:
        self._stretch = Stretch(rows, curvature.weights, 0, curvature.device)

    def total(self, function: Pass, *given: Any) -> Tree:
        """The sum of a pass over the rows."""
        return function(self._stretch, *given)

    def by_row(self, function: Pass, *given: Any) -> Tree:
        """What a pass gives for each row."""
        return function(self._stretch, *given)

    def rows(self) -> dict[str, Float[Tensor, "n m"]]:
        """All of them."""
        return self._stretch.rows


class ProjectedInParts(Projected):
    """Those that the parts of a curvature hold, made where they are not yet, or no longer.

    Args:
        curvature: in parts.
        sketch: from which those of the blocks come.
        name: of these rows among those of several sketches, and of their part of a store.
    """

    def __init__(self, curvature: Curvature, sketch: Sketch, name: str) -> None:
        self.curvature, self.sketch, self.name = curvature, sketch, name

    def total(self, function: Pass, *given: Any) -> Tree:
        """The sum of a pass over the rows."""
        return self.curvature.total(_on_stretch, self.sketch, self.name, function, given)

    def by_row(self, function: Pass, *given: Any) -> Tree:
        """What a pass gives for each row."""
        return self.curvature.by_row(_on_stretch, self.sketch, self.name, function, given)

    def rows(self) -> dict[str, Float[Tensor, "n m"]]:
        """All of them, fetched from the parts."""
        return self.by_row(_rows)

    def stored(self) -> Report | None:
        """What their stores did; None where there are none."""
        return self.curvature.total(_stored, self.sketch, self.name)


def project_train(curvature: Curvature, sketch: Sketch, name: str) -> tuple[Projected, Report | None]:
    """The projected train gradients of a curvature, and what their store did, where there is one."""
    if curvature.parts is not None:
        there = ProjectedInParts(curvature, sketch, name)
        return there, there.stored()
    sketches = curvature_sketches(sketch, curvature)
    rows, report = project_train_rows(curvature.rows, sketch, sketches, name)
    return ProjectedHere(rows, curvature), report


@dataclass(frozen=True)
class _Held:
    """What a part keeps of its projected rows between passes."""

    sketch: Sketch
    stretch: Stretch
    report: Report | None


def _held(part: Curvature, sketch: Sketch, name: str) -> _Held:
    kept = part.held.get(name)
    if not isinstance(kept, _Held) or kept.sketch != sketch:
        part.held.pop(name, None)
        sketches = curvature_sketches(sketch, part)
        rows, report = project_train_rows(part.rows, sketch, sketches, name)
        kept = _Held(sketch, Stretch(rows, part.weights, part.rows.batches.first, part.device), report)
        part.held[name] = kept
    return kept


def _on_stretch(part: Curvature, sketch: Sketch, name: str, function: Pass, given: tuple[Any, ...]) -> Tree:
    return function(_held(part, sketch, name).stretch, *given)


def _stored(part: Curvature, sketch: Sketch, name: str) -> Report | None:
    return _held(part, sketch, name).report


def _rows(stretch: Stretch) -> dict[str, Float[Tensor, "n m"]]:
    return stretch.rows


def second_moments(stretch: Stretch) -> dict[str, Float64[Tensor, "m m"]]:
    """Block → Σ w r rᵀ in float64."""
    found: dict[str, Tensor] = {}
    for block in stretch.rows:
        for start, rows in stretch.chunks(block):
            weights = stretch.weights_of(start, rows)
            part = second_moment(rows.double(), None if weights is None else weights[:, 0])
            found[block] = found[block].add_(part) if block in found else part
    return found


def products(
    stretch: Stretch, block: str, vectors: Float[Tensor, "m k"], dtype: torch.dtype | None
) -> Float64[Tensor, "n k"]:
    """r_jᵀv_i in float64, multiplied in `dtype`; None: in the rows' own."""
    # Written by columns, which is how scores are read.
    out = torch.empty(vectors.shape[1], len(stretch.rows[block]), dtype=torch.float64, device=stretch.device)
    for start, rows in stretch.chunks(block):
        own = rows.dtype if dtype is None else dtype
        out[:, start : start + len(rows)] = vectors.T.to(own) @ rows.to(own).T
    return out.T


def quadratic(
    stretch: Stretch, block: str, system: PositiveMatrix, shift: float, squared: bool
) -> Float64[Tensor, " n"]:
    """r_jᵀ(M+μ)⁻¹r_j, or ‖(M+μ)⁻¹r_j‖²."""
    # Not a list of parts: small results between large intermediate ones keep the memory of these from being used again.
    out = torch.empty(len(stretch.rows[block]), dtype=torch.float64, device=stretch.device)
    for start, rows in stretch.chunks(block):
        columns = rows.double().T
        solved = system.solve(columns, shift)
        torch.sum(solved.mul_(solved if squared else columns), dim=0, out=out[start : start + len(rows)])
    return out


def sums_of_rows(stretch: Stretch, block: str, sums: ColumnSums) -> Float64[Tensor, "g m"]:
    """Σ_j f_j w_j r_j of each group."""
    total: Tensor | None = None
    for start, rows in stretch.chunks(block):
        weights = stretch.weights_of(start, rows)
        weighted = rows.double() if weights is None else rows.double() * weights
        part = sums.stretch(stretch.first + start, len(rows)).rows(weighted)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
