"""Scores from randomly projected gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from refluence.curvature import Curvature, OuterCurvature
from refluence.errors import PlanError
from refluence.sketches import Sketch
from refluence.sketches.memory import sketch_cache_bytes
from refluence.solvers.cost import EIGENVALUES_WORK, Cost, Workload
from refluence.solvers.projected import CHUNK_ROWS, ProjectedHere, project_train, second_moments
from refluence.solvers.projection import (
    block_sketches,
    curvature_sketches,
    project_rows,
    sketched_curvature,
)
from refluence.solvers.replicated import ReplicatedState, exported_members, replicate_sketches, replicated_cost
from refluence.solvers.sketch_errors import has_error_formula
from refluence.solvers.sketched_state import SketchedDual, SketchedPrimal, SketchedState
from refluence.solvers.systems import exported_matrices, root_weights, weighted_gram
from refluence.store.held import Report

__all__ = ["Sketched", "SketchedDual", "SketchedPrimal", "SketchedState", "block_sketches", "project_rows"]


@dataclass(frozen=True)
class Sketched:
    """τ̃ = (Pv)ᵀ(PCPᵀ + μI)⁻¹(Pg) from one pass over the gradients, for any curvature.

    Args:
        sketch: P, with m rows for each block.
        corrected: μ is chosen so that the scores estimate the exact ones at the damping asked for, because a sketch
            adds damping of its own (`rf.theory.corrected_damping`); False: μ is the damping asked for, as published.
        replicates: how many independent sketches are averaged; from two on the errors come from their spread, for every
            kind of sketch (`ReplicatedState`).

    Every score of a Gaussian, Rademacher or SJLT sketch of a curvature C ⪰ 0 has a standard error about the exact score
    at `scores.target_damping`: the damping asked for or, not corrected, the larger one that the scores really estimate.
    """

    sketch: Sketch
    corrected: bool = True
    replicates: int = 1

    singular: ClassVar[bool] = True
    """Whether solutions lie in a subspace, so that it cannot precondition."""

    def __post_init__(self) -> None:
        if not isinstance(self.sketch, Sketch):
            raise PlanError(f"Sketched needs a sketch such as rf.sketches.SJLT(4096), not {type(self.sketch).__name__}")
        if not isinstance(self.replicates, int) or isinstance(self.replicates, bool) or self.replicates < 1:
            raise PlanError(f"replicates of Sketched must be an integer of at least 1, not {self.replicates!r}")

    def prepare(self, curvature: Curvature) -> SketchedState | ReplicatedState:
        """Project the train gradients and the curvature; keep the m×m or the n×n side, whichever is smaller."""
        if self.replicates > 1:
            states = [member._prepare(curvature, f"member-{r}") for r, member in enumerate(self.members)]
            state = ReplicatedState(curvature, states)
            if "store" in states[0].diagnostics:
                state.diagnostics["store"] = [member.diagnostics["store"] for member in states]
            return state
        return self._prepare(curvature)

    @property
    def members(self) -> list[Sketched]:
        """The solvers, one for each sketch, whose scores are averaged."""
        sketches = replicate_sketches(self.sketch, self.replicates)
        return [replace(self, sketch=sketch, replicates=1) for sketch in sketches]

    def _prepare(self, curvature: Curvature, part: str = "") -> SketchedState:
        state, stored = self._projected(curvature, part)
        if stored is not None:
            state.diagnostics["store"] = stored.record()
        return state

    def _projected(self, curvature: Curvature, part: str) -> tuple[SketchedState, Report | None]:
        """The state, and what the store of its train rows did."""
        if not (isinstance(curvature, OuterCurvature) and curvature.own_rows):
            moments = sketched_curvature(curvature, curvature_sketches(self.sketch, curvature))
            projected, stored = project_train(curvature, self.sketch, part)
            return SketchedPrimal(self.sketch, self.corrected, curvature, moments, projected), stored
        projected, stored = project_train(curvature, self.sketch, part)
        if self.sketch.m > curvature.n:
            here, roots = projected.rows(), root_weights(curvature.weights)
            doubles = ((block, rows.to(device=curvature.device, dtype=torch.float64)) for block, rows in here.items())
            grams = {block: weighted_gram(p @ p.T, curvature.n, roots) for block, p in doubles}
            return SketchedDual(self.sketch, self.corrected, curvature, grams, ProjectedHere(here, curvature)), stored
        sums = projected.total(second_moments)
        means = {block: total.to(curvature.device).div_(curvature.n) for block, total in sums.items()}
        return SketchedPrimal(self.sketch, self.corrected, curvature, means, projected), stored

    def restore(self, curvature: Curvature, tensors: dict[str, Tensor]) -> SketchedState | ReplicatedState:
        """The state from what it exported."""
        if self.replicates > 1:
            given = zip(self.members, exported_members(tensors, self.replicates), strict=True)
            return ReplicatedState(curvature, [member._restore(curvature, part) for member, part in given])
        return self._restore(curvature, tensors)

    def _restore(self, curvature: Curvature, tensors: dict[str, Tensor]) -> SketchedState:
        projected = {k.removeprefix("rows/"): v for k, v in tensors.items() if k.startswith("rows/")}
        matrices = exported_matrices(tensors)
        kind = SketchedPrimal if next(iter(matrices.values())).shape[0] == self.sketch.m else SketchedDual
        return kind(self.sketch, self.corrected, curvature, matrices, ProjectedHere(projected, curvature))

    def cost(self, w: Workload) -> Cost:
        """n·m numbers kept unless they are held elsewhere, and one pass of projections."""
        m, side, blocks = self.sketch.m, min(self.sketch.m, w.n), len(w.dimensions)
        projection = self.sketch.work(w.d, w.bytes_per_row / w.itemsize)
        held = 0 if w.held_elsewhere else w.n * m * max(4, w.itemsize)
        # Rows are taken in float64 some at a time, but by the n×n side all at once.
        doubled = w.n if m > w.n else min(w.n, CHUNK_ROWS)
        fixed = blocks * (16.0 * side**2 + held) + 8.0 * (side**2 + doubled * m + w.tests * m)
        work = (w.n + w.tests) * projection + blocks * (w.n * m * side + w.n * m * w.tests)
        work += blocks * (1.0 + EIGENVALUES_WORK) * side**3 / 3
        if w.q is None:
            work += m * w.product_work + blocks * m * projection
        elif w.q > 1:
            work += w.n * w.q * (projection + m**2)
        score_bytes = w.score_bytes
        if has_error_formula(self.sketch):
            score_bytes *= 2
            work += blocks * (w.n * m * side + w.n * m * w.tests)
        one = Cost(fixed + score_bytes + sketch_cache_bytes(self.sketch, w.d), 0.0, work)
        return replicated_cost(one, w, self.replicates)
