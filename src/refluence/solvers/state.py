"""What a solver makes of a curvature: a state that applies (C + μI)⁻¹ in the forms that scores need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from refluence.columns import ColumnSums
from refluence.curvature import Curvature, Vectors
from refluence.errors import PlanError
from refluence.gradients.rows import BlocksOfBatch, GradientRows
from refluence.theory import SpectralMeasure, effective_dimension

Shifts = dict[str, float]

CHUNK_BYTES = 512 << 20
"""Memory for the dense gradients of the train examples that are solved for together."""


@dataclass(frozen=True)
class Solution:
    """(C_b + μ_b I)⁻¹ V_b for every block, with what is known of its accuracy for each of the k columns.

    Args:
        values: block → (d, k).
        residual: ‖(C+μ)s − v‖/‖v‖ over all blocks, 0 where v = 0; None where it was not measured.
        iterations: of an iterative solver.
        converged: whether the solver's tolerance was met.
    """

    values: Vectors
    residual: Float[Tensor, " k"] | None = None
    iterations: Int64[Tensor, " k"] | None = None
    converged: Bool[Tensor, " k"] | None = None


class State(ABC):
    """A prepared solver; `shifts` gives each block's μ = l2 + λ.

    The train side of every product is w_j g_j, the gradient of example j's term in the weighted objective.
    """

    exact: bool = False
    """Whether the scores are those of the curvature itself, with no approximation but rounding."""
    independent_blocks: bool = False
    """Whether the errors of the blocks are independent, so that variances add; else the errors may add."""

    def __init__(self, curvature: Curvature) -> None:
        self.curvature = curvature
        self.n = curvature.n
        self.dimensions = curvature.dimensions
        self.diagnostics: dict[str, Any] = {}

    @cached_property
    def traces(self) -> dict[str, float]:
        """Block → tr C_b."""
        return self.curvature.traces()

    def spectra(self) -> dict[str, SpectralMeasure]:
        """Block → what is known of the spectrum of C_b."""
        return self.curvature.spectra()

    def effective_dimension(self, shifts: Shifts) -> float:
        """Σ_b tr C_b(C_b+μ_bI)⁻¹; negative eigenvalues count as 0."""
        return sum(
            effective_dimension(measure.positive_part().values, shifts[block], measure.counts)
            for block, measure in self.spectra().items()
        )

    def known_dimension(self, shifts: Shifts) -> float | None:
        """The effective dimension where it takes no estimate that nothing else has asked for."""
        return self.effective_dimension(shifts) if self.knows_spectrum else None

    @property
    def knows_spectrum(self) -> bool:
        """Whether `spectra` is at hand."""
        return self.curvature.known_spectra is not None

    def export(self) -> dict[str, Tensor]:
        """What the solver's `restore` needs beside the curvature."""
        return {}

    @abstractmethod
    def solve(self, vectors: Vectors, shifts: Shifts) -> Solution:
        """Block → (C_b+μ_bI)⁻¹ V_b of the blocks given."""

    @abstractmethod
    def scores(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[str, Float[Tensor, "k n"]]]:
        """Block → τ(v_i, w_j g_j); the blocks sum to the scores."""

    def deviations(
        self, tests: GradientRows, shifts: Shifts, sums: ColumnSums | None = None
    ) -> Iterator[tuple[str, Float[Tensor, "k g"]]] | None:
        """Block → standard error of each score, or of sums of its columns; None where there is none or it is unknown.

        Errors of several blocks combine as `independent_blocks` says.
        """
        return None

    def targets(self, shifts: Shifts) -> Shifts:
        """Block → the μ whose exact scores the scores at `shifts` estimate."""
        return shifts

    @abstractmethod
    def self_influence(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """τ(g_j, w_j g_j), summed over blocks."""

    @abstractmethod
    def inverse_norms(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """‖(C+μI)⁻¹ w_j g_j‖² over all blocks."""

    def inverse_hvp(self, tests: GradientRows, shifts: Shifts) -> dict[str, Float[Tensor, "k d"]]:
        """Block → (C+μI)⁻¹ v_i."""
        found: dict[str, list[Tensor]] = {}
        for vectors in gradient_tiles(tests, torch.float64):
            for block, values in self.solve(vectors, shifts).values.items():
                found.setdefault(block, []).append(values.T.double())
        return {block: torch.cat(parts) for block, parts in found.items()}


class OperatorState(State):
    """A state that is its `solve`; everything else is streamed from it."""

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the inner products of solved vectors with gradients."""
        return torch.float64

    def scores(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[str, Float[Tensor, "k n"]]]:
        """Block → τ(v_i, w_j g_j)."""
        parts: dict[str, list[Tensor]] = {}
        for vectors in gradient_tiles(tests, torch.float64):
            solved = self.solve(vectors, shifts).values
            for block, values in products_with(self.curvature.rows, solved, self.product_dtype).items():
                parts.setdefault(block, []).append(values)
        for block, tiles in parts.items():
            values = torch.cat(tiles)
            yield block, values if self.curvature.weights is None else values * self.curvature.weights.to(values)

    def _over_train(self, shifts: Shifts, squared: bool) -> Float[Tensor, " n"]:
        rows = self.curvature.rows
        total = torch.zeros(self.n, dtype=torch.float64, device=rows.device)
        start = 0
        for vectors in gradient_tiles(rows, torch.float64):
            solved = self.solve(vectors, shifts).values
            count = next(iter(vectors.values())).shape[1]
            for block, values in solved.items():
                other = values if squared else vectors[block]
                total[start : start + count] += (values.double() * other.double()).sum(dim=0)
            start += count
        if self.curvature.weights is not None:
            total *= self.curvature.weights.to(total) ** (2 if squared else 1)
        return total

    def self_influence(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """τ(g_j, w_j g_j)."""
        return self._over_train(shifts, squared=False)

    def inverse_norms(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """‖(C+μI)⁻¹ w_j g_j‖²."""
        return self._over_train(shifts, squared=True)


def gradient_tiles(rows: GradientRows, dtype: torch.dtype) -> Iterator[Vectors]:
    """Gradients as columns, block → (d, k), as many together as a bounded memory holds, in the order of the rows."""
    d = sum(rows.dimension(group) for group in rows.groups)
    waiting: dict[str, list[Tensor]] = {group: [] for group in rows.groups}
    for last, blocks in cut_rows(rows, max(1, CHUNK_BYTES // (8 * d))):
        for group, block in blocks.items():
            waiting[group].append(block.dense().to(dtype))
        if last:
            yield {group: torch.cat(parts).T for group, parts in waiting.items()}
            waiting = {group: [] for group in rows.groups}


def cut_rows(rows: GradientRows, size: int) -> Iterator[tuple[bool, BlocksOfBatch]]:
    """(whether a tile of `size` examples ends here, gradients of some), in order; the last tile may be smaller."""
    done = 0
    for start, blocks in rows:
        total = next(iter(blocks.values())).n
        first = 0
        while first < total:
            last = min(total, first + size - done)
            done += last - first
            full = done == size or start + last == rows.n
            yield full, {group: block.rows(first, last) for group, block in blocks.items()}
            first, done = last, 0 if full else done


def products_with(rows: GradientRows, vectors: Vectors, dtype: torch.dtype) -> dict[str, Float[Tensor, "k n"]]:
    """Block → inner products of k vectors with every gradient, in float64 from products in `dtype`."""
    given = {block: values.to(dtype) for block, values in vectors.items()}
    return {block: found.to(vectors[block].device).T for block, found in rows.by_row(_products, given).items()}


def _products(rows: GradientRows, vectors: Vectors) -> dict[str, Float[Tensor, "n k"]]:
    """Block → GV in float64."""
    # Columns are what is read of the products, and what the rows are written to.
    out = {
        block: torch.empty(values.shape[1], rows.n, dtype=torch.float64, device=values.device)
        for block, values in vectors.items()
    }
    for start, blocks in rows:
        for block, values in vectors.items():
            out[block][:, start : start + blocks[block].n] = blocks[block].matvec(values).T
    return {block: values.T for block, values in out.items()}


def refuse_singular(rank: int, size: int, block: str) -> None:
    """At λ = 0, an error unless the curvature has full rank."""
    if rank < size:
        raise PlanError(
            f"the curvature of block {block!r} is singular (rank {rank} of {size}), so it has no inverse at damping 0: "
            "use a damping > 0"
        )
