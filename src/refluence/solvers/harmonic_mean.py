"""The mean of the inverses of every gradient's own damped outer product (DataInf)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from refluence.curvature import Curvature, OuterCurvature, Vectors
from refluence.errors import PlanError
from refluence.gradients.kernels import cross_grams, pairs
from refluence.gradients.rows import BlocksOfBatch, GradientRows
from refluence.solvers.cost import Cost, Workload
from refluence.solvers.state import OperatorState, Shifts, Solution


@dataclass(frozen=True)
class HarmonicMean:
    """(C + μI)⁻¹ ≈ (1/N) Σ_a (ω_a f_a f_aᵀ + μI)⁻¹ = (1/μ)[I − (1/N) Σ_a ω_a f_a f_aᵀ/(μ + ω_a‖f_a‖²)], for each block.

    For "fisher" the items are the N = n gradients g_i with ω_i = w_i. For "mc_fisher" they are the N = n·q gradients of
    sampled labels, with ω = q·w_i, because C = (1/n) Σ_i w_i Σ_q f_iq f_iqᵀ = (1/N) Σ_a ω_a f_a f_aᵀ.
    A mean of inverses in the place of the inverse of the mean, which it is never below (the inverse is operator
    convex): every direction is damped too little.
    Kwon, Wu, Wu & Zou 2023 (DataInf, arXiv 2310.00902).
    """

    needs_rows = True

    def prepare(self, curvature: Curvature) -> HarmonicMeanState:
        """Measure the norms of the gradients.

        Raises:
            PlanError: a curvature that is not a mean of gradients' outer products.
        """
        curvature = _checked(curvature)
        norms = {
            block: torch.empty(curvature.n, curvature.q, dtype=torch.float64, device=curvature.device)
            for block in curvature.groups
        }
        for start, blocks in curvature.features:
            for block, rows in blocks.items():
                values = rows.squared_norms().reshape(curvature.q, -1).T
                norms[block][start : start + values.shape[0]] = values
        return HarmonicMeanState(curvature, norms)

    def restore(self, curvature: Curvature, tensors: dict[str, Tensor]) -> HarmonicMeanState:
        """The state of what `export` gave."""
        return HarmonicMeanState(_checked(curvature), {b.removeprefix("norms/"): x for b, x in tensors.items()})

    def cost(self, w: Workload) -> Cost:
        """N·n inner products, and their products with the tests'."""
        if w.q is None:
            return Cost.impossible(
                "the curvature has no rows, single gradients of which it would be a mean: use "
                'curvature "fisher" or "mc_fisher"'
            )
        rows, blocks = w.n * w.q, len(w.dimensions)
        return Cost(
            fixed=blocks * 8.0 * rows * (w.tests + 1) + w.score_bytes + w.tests * w.bytes_per_row,
            kept=w.n * (w.bytes_per_row + w.feature_bytes_per_row),
            work=rows * (w.n + w.tests) * w.inner_product_work + float(blocks) * rows * w.n * w.tests,
            tiled=True,
        )


def _checked(curvature: Curvature) -> OuterCurvature:
    if not isinstance(curvature, OuterCurvature) or curvature.name not in ("fisher", "mc_fisher"):
        raise PlanError(
            "HarmonicMean is a mean over the gradients of single examples, which curvature "
            f'"{curvature.name}" is not made of: use curvature "fisher" or "mc_fisher"'
        )
    return curvature


class HarmonicMeanState(OperatorState):
    """H = (1/μ)(I − (1/n) Fᵀ D F) with D_a = w_a/(μ + q w_a‖f_a‖²); scores from Gram products, tile by tile.

    Args:
        norms: block → ‖f_iq‖² as (n, q).
    """

    def __init__(self, curvature: OuterCurvature, norms: dict[str, Float64[Tensor, "n q"]]) -> None:
        super().__init__(curvature)
        self.outer, self.norms = curvature, norms

    def export(self) -> dict[str, Tensor]:
        """The norms."""
        return {f"norms/{block}": values for block, values in self.norms.items()}

    def _own_weights(self, start: int, count: int) -> Float64[Tensor, "n 1"]:
        weights = self.outer.weights
        one = torch.ones(count, 1, dtype=torch.float64, device=self.outer.device)
        return self.outer.q * (one if weights is None else weights[start : start + count, None].to(one))

    def _diagonal(self, block: str, start: int, rows: int, shift: float) -> Float64[Tensor, " rows"]:
        """D of the feature rows of the batch that begins at example `start`, in the order of its blocks."""
        count = rows // self.outer.q
        weights = self._own_weights(start, count)
        norms = self.norms[block][start : start + count]
        return (weights / (shift + weights * norms) / self.outer.q).T.flatten()

    def _checked(self, shifts: Shifts) -> Shifts:
        for block, shift in shifts.items():
            if not shift > 0:
                raise PlanError(
                    f"HarmonicMean has no inverse at damping {shift:g} of block {block!r}, because a single gradient's "
                    "outer product is singular: use a damping > 0"
                )
        return shifts

    def solve(self, vectors: Vectors, shifts: Shifts) -> Solution:
        """Block → H V, in two passes' worth of products."""
        self._checked(shifts)
        values = {block: v.clone() for block, v in vectors.items()}
        for start, blocks in self.outer.features:
            for block, v in vectors.items():
                rows = blocks[block]
                diagonal = self._diagonal(block, start, rows.n, shifts[block]).to(v.dtype)
                values[block] -= rows.rmatvec(rows.matvec(v) * diagonal[:, None]) / self.n
        return Solution({block: v / shifts[block] for block, v in values.items()})

    def _grams(self) -> Iterator[tuple[int, BlocksOfBatch, int, BlocksOfBatch, bool]]:
        """(first example, feature rows, first example, gradients, whether the transpose is meant too)."""
        rows, features = self.outer.rows, self.outer.features
        if self.outer.own_rows and rows.kept:
            batches = list(rows)
            for i, (start, blocks) in enumerate(batches):
                for other, others in batches[: i + 1]:
                    yield start, blocks, other, others, start != other
            return
        for start, blocks, other, others in pairs(features, rows):
            yield start, blocks, other, others, False

    def scores(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[str, Float[Tensor, "k n"]]]:
        """Block → τ(v_i, w_j g_j) = (w_j/μ)[V Gᵀ − (1/n)(V Fᵀ D)(F Gᵀ)]; through `solve` where that is less work."""
        self._checked(shifts)
        if self._solving_is_cheaper(tests.n):
            yield from super().scores(tests, shifts)
            return
        features, q = self.outer.features, self.outer.q
        left = cross_grams(features, tests)
        own = {block: products.clone() for block, products in left.items()} if self.outer.own_rows else None
        totals = own or cross_grams(self.outer.rows, tests)
        for start, blocks in features:
            for block, products in left.items():
                here = slice(q * start, q * start + blocks[block].n)
                diagonal = self._diagonal(block, start, blocks[block].n, shifts[block])
                products[here] *= diagonal[:, None] / self.n
        for start, blocks, other, others, both in self._grams():
            for block, products in left.items():
                gram = blocks[block].gram(others[block])
                mine = slice(q * start, q * start + gram.shape[0])
                theirs = slice(other, other + gram.shape[1])
                totals[block][theirs].addmm_(gram.T, products[mine], alpha=-1.0)
                if both:
                    totals[block][mine].addmm_(gram, products[theirs], alpha=-1.0)
        for block in list(totals):
            values = totals.pop(block).div_(shifts[block])
            if self.outer.weights is not None:
                values *= self.outer.weights.to(values)[:, None]
            yield block, values.T

    def _solving_is_cheaper(self, tests: int) -> bool:
        """Multiply-adds of products with solved vectors against those of N·n inner products."""
        _, blocks = next(iter(self.outer.rows))
        rows = self.n * self.outer.q
        by_pairs = rows * self.n * sum(block.inner_product_work() + tests for block in blocks.values())
        return by_pairs > tests * (2 * rows + self.n) * sum(self.dimensions.values())

    def self_influence(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """τ(g_j, w_j g_j) = (w_j/μ)[‖g_j‖² − (1/n) Σ_a D_a (f_a·g_j)²]."""
        self._checked(shifts)
        total = self._norms_over(shifts)
        for start, blocks, other, others, both in self._grams():
            for block, rows in blocks.items():
                squares = rows.gram(others[block]).square_().div_(self.n * shifts[block])
                total[other : other + squares.shape[1]] -= self._diagonal(block, start, rows.n, shifts[block]) @ squares
                if both:
                    diagonal = self._diagonal(block, other, squares.shape[1], shifts[block])
                    total[start : start + rows.n] -= squares @ diagonal
        return total if self.outer.weights is None else total * self.outer.weights.to(total)

    def _norms_over(self, shifts: Shifts) -> Float64[Tensor, " n"]:
        total = torch.zeros(self.n, dtype=torch.float64, device=self.outer.device)
        for start, blocks in self.outer.rows:
            for block, rows in blocks.items():
                total[start : start + rows.n] += rows.squared_norms() / shifts[block]
        return total
