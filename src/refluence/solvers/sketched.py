"""Scores from randomly projected gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.curvature import Curvature, OuterCurvature, Vectors
from refluence.errors import PlanError
from refluence.gradients.blocks import accumulation_dtype
from refluence.gradients.rows import GradientRows
from refluence.sketches import SJLT, Sketch
from refluence.sketches.memory import sketch_cache_bytes
from refluence.solvers.cost import EIGENVALUES_WORK, Cost, Workload
from refluence.solvers.state import Shifts, Solution
from refluence.solvers.symmetric import SymmetricMatrix
from refluence.solvers.systems import (
    MatrixState,
    exported_matrices,
    root_weights,
    scale_rows,
    sum_over,
    weighted_gram,
)
from refluence.theory import SpectralMeasure, corrected_damping

LIFTED_ROWS = 256


@dataclass(frozen=True)
class Sketched:
    """τ̃ = (Pv)ᵀ(PCPᵀ + μI)⁻¹(Pg) from one pass over the gradients, for any curvature.

    Args:
        sketch: P, with m rows for each block.
        corrected: μ is chosen so that the scores estimate the exact ones at the damping asked for, because a sketch
            adds damping of its own (`rf.theory.corrected_damping`); False: μ is the damping asked for, as published.
    """

    sketch: Sketch
    corrected: bool = True

    singular: ClassVar[bool] = True
    """Whether solutions lie in a subspace, so that it cannot precondition."""

    def __post_init__(self) -> None:
        if not isinstance(self.sketch, Sketch):
            raise PlanError(f"Sketched needs a sketch such as rf.sketches.SJLT(4096), not {type(self.sketch).__name__}")

    def prepare(self, curvature: Curvature) -> SketchedState:
        """Project the train gradients and the curvature; keep the m×m or the n×n side, whichever is smaller."""
        sketches = block_sketches(self.sketch, curvature.groups)
        if isinstance(curvature, OuterCurvature) and curvature.own_rows:
            projected = project_rows(curvature.rows, sketches)
            if self.sketch.m > curvature.n:
                roots = root_weights(curvature.weights)
                grams = {b: weighted_gram(p.double() @ p.double().T, curvature.n, roots) for b, p in projected.items()}
                return SketchedDual(self, curvature, grams, projected)
            weights = curvature.weights
            moments = {b: _moment(p.double(), weights) / curvature.n for b, p in projected.items()}
        else:
            moments = _sketched_curvature(curvature, sketches)
            projected = project_rows(curvature.rows, sketches)
        return SketchedPrimal(self, curvature, moments, projected)

    def restore(self, curvature: Curvature, tensors: dict[str, Tensor]) -> SketchedState:
        """The state from what it exported."""
        projected = {k.removeprefix("rows/"): v for k, v in tensors.items() if k.startswith("rows/")}
        matrices = exported_matrices(tensors)
        kind = SketchedPrimal if next(iter(matrices.values())).shape[0] == self.sketch.m else SketchedDual
        return kind(self, curvature, matrices, projected)

    def cost(self, w: Workload) -> Cost:
        """n·m numbers kept, and one pass of projections."""
        m, side, blocks = self.sketch.m, min(self.sketch.m, w.n), len(w.dimensions)
        per_entry = self.sketch.nonzeros * 4.0 if isinstance(self.sketch, SJLT) else float(m)
        fixed = blocks * (16.0 * side**2 + w.n * m * max(4, w.itemsize)) + 8.0 * (side**2 + w.n * m + w.tests * m)
        work = (w.n + w.tests) * w.d * per_entry + blocks * (w.n * m * side + w.n * m * w.tests)
        work += blocks * (1.0 + EIGENVALUES_WORK) * side**3 / 3
        if w.q is None:
            work += m * w.product_work + blocks * m * w.d * per_entry
        elif w.q > 1:
            work += w.n * w.q * (w.d * per_entry + m**2)
        return Cost(fixed + w.score_bytes + sketch_cache_bytes(self.sketch, w.d), 0.0, work)


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


def _moment(rows: Float[Tensor, "b m"], weights: Tensor | None) -> Float[Tensor, "m m"]:
    return rows.T @ (rows if weights is None else rows * weights.to(rows.device)[:, None])


def _sketched_curvature(curvature: Curvature, sketches: dict[str, Sketch]) -> dict[str, Float[Tensor, "m m"]]:
    """Block → P C Pᵀ."""
    found: dict[str, Tensor] = {}
    if isinstance(curvature, OuterCurvature):
        for start, blocks in curvature.features:
            for block, rows in blocks.items():
                projected = rows.sketch(sketches[block]).double()
                part = _moment(projected, curvature.feature_weights(start, rows.n)) / curvature.n
                found[block] = found[block].add_(part) if block in found else part
        return found
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


def block_sketches(sketch: Sketch, groups: Sequence[str]) -> dict[str, Sketch]:
    """A sketch for each block, independent of the others and of other seeds' ones; a single block has `sketch`."""
    if len(groups) == 1:
        return {groups[0]: sketch}
    digests = {group: hashlib.sha256(f"{sketch.seed}:{group}".encode()).digest() for group in groups}
    return {group: sketch.reseeded(int.from_bytes(digest[:7], "big")) for group, digest in digests.items()}


class SketchedState(MatrixState):
    """Projected train gradients, and for each block a matrix with the non-zero eigenvalues of PCPᵀ."""

    def __init__(
        self,
        config: Sketched,
        curvature: Curvature,
        matrices: dict[str, Tensor],
        projected: dict[str, Float[Tensor, "n m"]],
    ) -> None:
        super().__init__(curvature, matrices)
        if not curvature.positive:
            self.systems = {block: SymmetricMatrix(matrix) for block, matrix in matrices.items()}
        self.config, self.projected = config, projected
        self.sketches = block_sketches(config.sketch, curvature.groups)
        self._shifts: dict[tuple[str, float], float] = {}

    def export(self) -> dict[str, Tensor]:
        """The matrices and the projected gradients."""
        return super().export() | {f"rows/{block}": rows for block, rows in self.projected.items()}

    def shift(self, block: str, shift: float) -> float:
        """μ for the wanted κ: κ(1 − d/m) where corrected, else κ itself."""
        if not self.config.corrected:
            return shift
        if (block, shift) not in self._shifts:
            eigenvalues = self.systems[block].eigenvalues
            self._shifts[block, shift] = corrected_damping(eigenvalues, self.config.sketch.m, shift)
        return self._shifts[block, shift]

    def spectra(self) -> dict[str, SpectralMeasure]:
        """Block → (eigenvalues of PCPᵀ, m where they are to be corrected)."""
        size = self.config.sketch.m if self.config.corrected else None
        return {b: SpectralMeasure(system.eigenvalues, sketch_size=size) for b, system in self.systems.items()}

    @cached_property
    def traces(self) -> dict[str, float]:
        """Block → tr C_b, from the gradients themselves and not from their sketch."""
        return self.curvature.traces()

    def _project(self, tests: GradientRows) -> dict[str, Float[Tensor, "k m"]]:
        return {block: rows.double() for block, rows in project_rows(tests, self.sketches).items()}

    def _weighted(self, values: Float[Tensor, "... n"], power: int = 1) -> Float[Tensor, "... n"]:
        weights = self.curvature.weights
        return values if weights is None else values * weights.to(values) ** power


class SketchedPrimal(SketchedState):
    """Sketched scores through the m×m matrix."""

    def rank_needed(self, block: str) -> int:
        """The rank at which the sketched curvature is regular."""
        return self.config.sketch.m

    def solve(self, vectors: Vectors, shifts: Shifts) -> Solution:
        """Pᵀ(PCPᵀ+μ)⁻¹PV, whose inner products with gradients are the sketched scores."""
        found = {}
        for block, system, shift in self.systems_at({block: shifts[block] for block in vectors}):
            sketch, v = self.sketches[block], vectors[block].double()
            found[block] = sketch.lift(system.solve(sketch.project(v.T).T, shift), v.shape[0])
        return Solution(found)

    def scores(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[str, Float[Tensor, "k n"]]]:
        """Block → τ̃(v_i, w_j g_j)."""
        vectors = self._project(tests)
        for block, system, shift in self.systems_at(shifts):
            solved = system.solve(vectors[block].T, shift)
            yield block, self._weighted((self.projected[block].double() @ solved).T)

    def _over_train(self, shifts: Shifts, squared: bool) -> Float[Tensor, " n"]:
        total = torch.zeros(self.n, dtype=torch.float64, device=self.curvature.device)
        for block, system, shift in self.systems_at(shifts):
            values = self.projected[block].double()
            solved = system.solve(values.T, shift).T
            total += (solved * (solved if squared else values)).sum(dim=1)
        return self._weighted(total, 2 if squared else 1)

    def self_influence(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """τ̃(g_j, w_j g_j)."""
        return self._over_train(shifts, squared=False)

    def inverse_norms(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """‖(PCPᵀ+μI)⁻¹ w_j Pg_j‖²."""
        return self._over_train(shifts, squared=True)


class SketchedDual(SketchedState):
    """Sketched scores through the n×n Gram matrix of the projected gradients, where m > n."""

    def rank_needed(self, block: str) -> int:
        """The rank at which the sketched curvature is regular."""
        return self.config.sketch.m

    @cached_property
    def _roots(self) -> Tensor | None:
        return root_weights(self.curvature.weights)

    def solve(self, vectors: Vectors, shifts: Shifts) -> Solution:
        """Pᵀ(PCPᵀ+μ)⁻¹PV by Woodbury."""
        found = {}
        for block, system, shift in self.systems_at({block: shifts[block] for block in vectors}):
            sketch, rows, v = self.sketches[block], self.projected[block].double(), vectors[block].double()
            projected = sketch.project(v.T).T
            inner = scale_rows(system.solve(scale_rows(rows @ projected, self._roots), shift), self._roots)
            found[block] = sketch.lift((projected - rows.T @ inner / self.n) / shift, v.shape[0])
        return Solution(found)

    def scores(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[str, Float[Tensor, "k n"]]]:
        """Block → τ̃(v_i, w_j g_j)."""
        vectors = self._project(tests)
        for block, system, shift in self.systems_at(shifts):
            right = scale_rows(self.projected[block].double() @ vectors[block].T, self._roots)
            yield block, scale_rows(system.solve(right, shift), self._roots).T

    def self_influence(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """τ̃(g_j, w_j g_j)."""
        return self.n * sum_over(system.leverages(shift) for _, system, shift in self.systems_at(shifts))

    def inverse_norms(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """‖(PCPᵀ+μI)⁻¹ w_j Pg_j‖²."""
        total = self.n * sum_over(system.squared_leverages(shift) for _, system, shift in self.systems_at(shifts))
        return self._weighted(total)
