"""The dual side: N×N Gram matrices of the rows F of a curvature C = FᵀWF/n, whatever their length.

Axis letters: N rows of the curvature, n train and k test examples.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.columns import ColumnSums
from refluence.curvature import OuterCurvature, Vectors
from refluence.errors import PlanError
from refluence.gradients.kernels import cross_grams, gram_matrices
from refluence.gradients.rows import GradientRows
from refluence.solvers.psd import PositiveMatrix
from refluence.solvers.state import Shifts, Solution
from refluence.solvers.systems import MatrixState, root_weights, scale_rows, sum_over, weighted_gram

DAMPED_ONLY = "the dual solver gives {what} for a damping > 0 only: use solver Dense at damping 0"


class GramState(MatrixState):
    """K = √W F Fᵀ √W / n and Woodbury's identity, (C+μ)⁻¹ = (I − Fᵀ√W (K+μ)⁻¹ √W F/n)/μ."""

    exact = True
    curvature: OuterCurvature

    def __init__(self, curvature: OuterCurvature, matrices: dict[str, Tensor] | None = None) -> None:
        self.roots = root_weights(curvature.row_weights)
        if matrices is None:
            grams = gram_matrices(curvature.features)
            matrices = {block: weighted_gram(gram, curvature.n, self.roots) for block, gram in grams.items()}
        super().__init__(curvature, matrices)

    def solve(self, vectors: Vectors, shifts: Shifts) -> Solution:
        """(C+μ)⁻¹V by Woodbury."""
        features, columns = self.curvature.features, {block: v.double() for block, v in vectors.items()}
        across = {b: products.to(columns[b].device) for b, products in features.by_row(_products, columns).items()}
        found = {block: v.clone() for block, v in columns.items()}
        inner = {}
        for block, system, shift in self.systems_at({block: shifts[block] for block in vectors}):
            if shift == 0:
                raise PlanError(DAMPED_ONLY.format(what="inverse_hvp"))
            inner[block] = scale_rows(system.solve(scale_rows(across[block], self.roots), shift), self.roots)
        for block, total in features.total(_combinations, inner).items():
            found[block] -= total.to(found[block].device) / self.n
        return Solution({block: total / shifts[block] for block, total in found.items()})


def _products(rows: GradientRows, vectors: Vectors) -> dict[str, Float[Tensor, "N k"]]:
    """Block → FV."""
    found: dict[str, list[Tensor]] = {block: [] for block in vectors}
    for _, blocks in rows:
        for block, v in vectors.items():
            found[block].append(blocks[block].matvec(v))
    return {block: torch.cat(parts) for block, parts in found.items()}


def _combinations(rows: GradientRows, coefficients: dict[str, Float[Tensor, "N k"]]) -> Vectors:
    """Block → Fᵀ applied to the coefficients of the rows of the whole data set."""
    totals: dict[str, Tensor] = {}
    q = rows.q
    for start, blocks in rows:
        at = q * (rows.batches.first + start)
        for block, values in coefficients.items():
            part = blocks[block].rmatvec(values[at : at + blocks[block].n])
            totals[block] = totals[block].add_(part) if block in totals else part
    return totals


class DualState(GramState):
    """The rows are the train gradients, so that τ(v, w_j g_j) = √w_j [(K+μ)⁻¹ √W G v]_j, in which no term cancels.

    Push-through: (GᵀWG/n + μ)⁻¹ Gᵀ√W = Gᵀ√W (K + μ)⁻¹.
    """

    def scores(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[str, Float[Tensor, "k n"]]]:
        """Block → τ(v_i, w_j g_j)."""
        across = cross_grams(self.curvature.features, tests)
        for block, system, shift in self.systems_at(shifts):
            right = scale_rows(across.pop(block), self.roots)
            yield block, scale_rows(system.solve(right, shift), self.roots).T

    def self_influence(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """n · diag K(K+μI)⁻¹: n times the ridge leverage scores."""
        return self.n * sum_over(system.leverages(shift) for _, system, shift in self.systems_at(shifts))

    def inverse_norms(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """w_j · n · diag K(K+μI)⁻²."""
        total = self.n * sum_over(system.squared_leverages(shift) for _, system, shift in self.systems_at(shifts))
        return total if self.roots is None else total * self.roots.to(total.device).square()


class WoodburyState(GramState):
    """The rows are others than the train gradients: τ(v, g) = (vᵀg − (√WFv)ᵀ(K+μ)⁻¹(√WFg)/n)/μ.

    Exact to a relative error of ε·‖v‖‖g‖/(μ|τ|): the two terms cancel where the rows nearly span v or g. With sampled
    labels every score also has a standard error over the samples.

    Args:
        samples: labels drawn for each example, 0 where the rows are no sample.
    """

    def __init__(self, curvature: OuterCurvature, matrices: dict[str, Tensor] | None = None, samples: int = 0) -> None:
        super().__init__(curvature, matrices)
        self.samples = samples

    def scores(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[str, Float[Tensor, "k n"]]]:
        """Block → τ(v_i, w_j g_j)."""
        rows = self.curvature.rows
        direct, with_tests = cross_grams(rows, tests), cross_grams(self.curvature.features, tests)
        with_train = cross_grams(self.curvature.features, rows)
        for block, system, shift in self._damped(shifts):
            solved = system.solve(scale_rows(with_tests.pop(block), self.roots), shift)
            inner = scale_rows(with_train.pop(block), self.roots).T @ solved
            values = (direct.pop(block) - inner / self.n) / shift
            yield block, scale_rows(values, self.curvature.weights).T

    def deviations(
        self, tests: GradientRows, shifts: Shifts, sums: ColumnSums | None = None
    ) -> Iterator[tuple[str, Float[Tensor, "k g"]]] | None:
        """Block → standard error over the sampled labels, of first order in each row left out and drawn again.

        dτ = −vᵀ(C'+μ)⁻¹ dC (C+μ)⁻¹g with C' the curvature without the row, (C'+μ)⁻¹f = (C+μ)⁻¹f/(1 − its leverage).
        """
        return self._deviations(tests, shifts, sums) if self.samples > 1 else None

    def _deviations(
        self, tests: GradientRows, shifts: Shifts, sums: ColumnSums | None
    ) -> Iterator[tuple[str, Float[Tensor, "k g"]]]:
        features = self.curvature.features
        with_tests, with_train = cross_grams(features, tests), cross_grams(features, self.curvature.rows)
        order = sample_order(features.n, features.batches.batch_size, self.samples)
        for block, system, shift in self._damped(shifts):
            # By push-through these are √W F (C+μ)⁻¹ applied to the test and train gradients.
            left = system.solve(scale_rows(with_tests.pop(block), self.roots), shift)
            right = system.solve(scale_rows(with_train.pop(block), self.roots), shift)
            right = self._weighted(right, 1)
            if sums is not None:
                right = sums.columns(right)
            # Without a row its own influence is larger by 1/(1 − leverage), which the row's presence hides.
            left /= (shift * system.inverse_diagonal(shift))[:, None]
            yield block, sampling_variance(left[order], right[order], self.n).sqrt_()

    def _damped(self, shifts: Shifts) -> Iterator[tuple[str, PositiveMatrix, float]]:
        for block, system, shift in self.systems_at(shifts):
            if shift == 0:
                raise PlanError(DAMPED_ONLY.format(what="scores of this curvature"))
            yield block, system, shift

    def _reduced(self, shifts: Shifts) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """(block, √WFGᵀ, (K+μ)⁻¹√WFGᵀ, μ)."""
        with_train = cross_grams(self.curvature.features, self.curvature.rows)
        for block, system, shift in self._damped(shifts):
            across = scale_rows(with_train.pop(block), self.roots)
            yield block, across, system.solve(across, shift), shift

    def _norms(self) -> dict[str, Float[Tensor, " n"]]:
        norms = self.curvature.rows.squared_norms()
        return {block: of_block.to(self.curvature.device) for block, of_block in norms.items()}

    def _weighted(self, total: Float[Tensor, "... n"], power: int) -> Float[Tensor, "... n"]:
        weights = self.curvature.weights
        return total if weights is None else total * weights.to(total) ** power

    def self_influence(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """τ(g_j, w_j g_j)."""
        norms = self._norms()
        return self._weighted(
            sum_over(
                (norms[block] - (across * solved).sum(dim=0) / self.n) / shift
                for block, across, solved, shift in self._reduced(shifts)
            ),
            1,
        )

    def inverse_norms(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """‖(C+μI)⁻¹ w_j g_j‖² = w_j²(‖g‖² − 2aᵀs/n + sᵀKs/n)/μ² with a = √WFg, s = (K+μ)⁻¹a."""
        norms = self._norms()
        parts = []
        for block, across, solved, shift in self._reduced(shifts):
            within = (solved * (self.systems[block].matrix @ solved)).sum(dim=0)
            parts.append((norms[block] - 2 * (across * solved).sum(dim=0) / self.n + within / self.n) / shift**2)
        return self._weighted(sum_over(iter(parts)).clamp_(min=0.0), 2)


def sample_order(n: int, batch_size: int, samples: int) -> Tensor:
    """(S, n): the rows of sample s of every example, in the order of `gram_matrices`."""
    starts = range(0, n, batch_size)
    parts = [
        torch.arange(samples * start, samples * min(start + batch_size, n)).reshape(samples, -1) for start in starts
    ]
    return torch.cat(parts, dim=1)


def sampling_variance(left: Float[Tensor, "S n k"], right: Float[Tensor, "S n m"], n: int) -> Float[Tensor, "k m"]:
    """Variance of (1/n) Σ_l Σ_s x_lsi y_lsj when the S terms of each example l are independent draws.

    x = fᵀ(C+μ)⁻¹v and y = fᵀ(C+μ)⁻¹g of rows f that already hold the factor 1/√S, so that each term is a share 1/S of
    the example: Var = S/(S−1) Σ_l [Σ_s (xy)² − (Σ_s xy)²/S]/n².
    """
    samples = left.shape[0]
    squares = left.square().flatten(0, 1).T @ right.square().flatten(0, 1)
    sums = torch.zeros_like(squares)
    for s in range(samples):
        for r in range(s + 1):
            product = (left[s] * left[r]).T @ (right[s] * right[r])
            sums += product if r == s else 2 * product
    return ((squares - sums / samples) * (samples / ((samples - 1) * n**2))).clamp_(min=0.0)
