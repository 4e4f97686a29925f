"""Scores from randomly projected gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from refluence.curvature import EmpiricalFisher
from refluence.errors import PlanError
from refluence.gradients.blocks import accumulation_dtype
from refluence.gradients.rows import GradientRows
from refluence.sketches import Sketch
from refluence.solvers.dual import DualState
from refluence.solvers.primal import FeaturesOfBatch, PrimalState
from refluence.solvers.psd import PositiveMatrix
from refluence.solvers.state import Shifts
from refluence.theory import corrected_damping

FEATURE_ROWS = 4096
NO_COORDINATES = "a sketch does not keep the gradients' own coordinates: use solver Gram or Dense for inverse_hvp"


@dataclass(frozen=True)
class Sketched:
    """τ̃ = (Pv)ᵀ(PCPᵀ + μI)⁻¹(Pg) from one pass over the gradients.

    Args:
        sketch: P, with m rows for each block.
        corrected: μ is chosen so that the scores estimate the exact ones at the damping asked for, because a sketch
            adds damping of its own (`rf.theory.corrected_damping`); False: μ is the damping asked for, as published.
    """

    sketch: Sketch
    corrected: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.sketch, Sketch):
            raise PlanError(f"Sketched needs a sketch such as rf.sketches.SJLT(4096), not {type(self.sketch).__name__}")

    def prepare(self, curvature: EmpiricalFisher) -> SketchedPrimal | SketchedDual:
        """Project the train gradients; keep the m×m or the n×n side, whichever is smaller."""
        rows = SketchedRows(self.sketch, curvature)
        kind = SketchedPrimal if self.sketch.m <= curvature.n else SketchedDual
        return kind(rows, curvature, self.corrected)


class SketchedRows:
    """Projected gradients, kept in the gradients' dtype; serves as features and as kernel."""

    def __init__(self, sketch: Sketch, curvature: EmpiricalFisher) -> None:
        rows = curvature.rows
        self.n, self.m = rows.n, sketch.m
        self.sketches = block_sketches(sketch, rows.groups)
        self.projected = {
            group: torch.empty(self.n, self.m, dtype=accumulation_dtype(rows.dtype), device=rows.device)
            for group in rows.groups
        }
        self.traces = dict.fromkeys(rows.groups, 0.0)
        for start, blocks in rows:
            for group, block in blocks.items():
                here = slice(start, start + block.n)
                self.projected[group][here] = block.sketch(self.sketches[group])
                norms = block.squared_norms()
                if curvature.weights is not None:
                    norms = norms * curvature.weights[here].to(norms)
                self.traces[group] += float(norms.sum()) / self.n

    def train(self) -> Iterator[FeaturesOfBatch]:
        """(first row, block → projected gradients)."""
        for start in range(0, self.n, FEATURE_ROWS):
            yield start, {group: rows[start : start + FEATURE_ROWS] for group, rows in self.projected.items()}

    def tests(self, tests: GradientRows) -> dict[str, Float[Tensor, "k m"]]:
        """Block → projected test gradients."""
        parts: dict[str, list[Tensor]] = {}
        for _, blocks in tests:
            for group, block in blocks.items():
                parts.setdefault(group, []).append(block.sketch(self.sketches[group]))
        return {group: torch.cat(part) for group, part in parts.items()}

    def among(self) -> dict[str, Float[Tensor, "n n"]]:
        """Block → (GPᵀ)(GPᵀ)ᵀ."""
        return {group: rows.double() @ rows.double().T for group, rows in self.projected.items()}

    def across(self, tests: GradientRows) -> dict[str, Float[Tensor, "n k"]]:
        """Block → products with projected test gradients."""
        projected = self.tests(tests)
        return {group: rows.double() @ projected[group].double().T for group, rows in self.projected.items()}


def block_sketches(sketch: Sketch, groups: Sequence[str]) -> dict[str, Sketch]:
    """A sketch for each block, independent of the others and of other seeds' ones; a single block has `sketch`."""
    if len(groups) == 1:
        return {groups[0]: sketch}
    digests = {group: hashlib.sha256(f"{sketch.seed}:{group}".encode()).digest() for group in groups}
    return {group: sketch.reseeded(int.from_bytes(digest[:7], "big")) for group, digest in digests.items()}


class _Corrected:
    """The damping put on a sketched matrix for the damping that its values are to estimate."""

    exact = False
    systems: dict[str, PositiveMatrix]
    size: int
    corrected: bool

    def shift(self, block: str, shift: float) -> float:
        """μ for the wanted κ: κ(1 − d/m) where corrected, else κ itself."""
        if not self.corrected:
            return shift
        cached: dict[tuple[str, float], float] = self.__dict__.setdefault("_own_shifts", {})
        if (block, shift) not in cached:
            cached[block, shift] = corrected_damping(self.systems[block].eigenvalues, self.size, shift)
        return cached[block, shift]

    def spectra(self) -> dict[str, tuple[NDArray[np.float64], int | None]]:
        """Block → (eigenvalues of PCPᵀ, m where they are to be corrected)."""
        size = self.size if self.corrected else None
        return {block: (system.eigenvalues, size) for block, system in self.systems.items()}


class SketchedPrimal(_Corrected, PrimalState):
    """Sketched scores through the m×m matrix."""

    def __init__(self, rows: SketchedRows, curvature: EmpiricalFisher, corrected: bool) -> None:
        self.size, self.corrected = rows.m, corrected
        super().__init__(rows, curvature.dimensions, curvature.weights, rows.traces)

    def inverse_hvp(self, tests: GradientRows, shifts: Shifts) -> dict[str, Float[Tensor, "k p"]]:
        """Refused: a sketch does not keep the gradients' own coordinates."""
        raise PlanError(NO_COORDINATES)


class SketchedDual(_Corrected, DualState):
    """Sketched scores through the n×n matrix."""

    def __init__(self, rows: SketchedRows, curvature: EmpiricalFisher, corrected: bool) -> None:
        self.size, self.corrected = rows.m, corrected
        super().__init__(rows, curvature.dimensions, curvature.weights, rows.traces)

    def rank_needed(self, block: str) -> int:
        """The rank at which the m×m matrix is regular."""
        return self.size

    def inverse_hvp(self, tests: GradientRows, shifts: Shifts) -> dict[str, Float[Tensor, "k p"]]:
        """Refused: a sketch does not keep the gradients' own coordinates."""
        raise PlanError(NO_COORDINATES)
