"""The dual (n×n) side: with K = √W G Gᵀ √W / n, scores are (K+μI)⁻¹ applied to the cross Gram.

Push-through: (GᵀWG/n + μ)⁻¹ Gᵀ√W = Gᵀ√W (K + μ)⁻¹, so τ(v, w_j g_j) = √w_j [(K+μ)⁻¹ √W G v]_j; no term cancels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from refluence.errors import PlanError
from refluence.gradients.rows import GradientRows
from refluence.solvers.kernels import cross_grams, gram_matrices
from refluence.solvers.psd import PositiveMatrix
from refluence.solvers.state import Shifts, State, refuse_singular, root_weights, scale_rows


@runtime_checkable
class Kernel(Protocol):
    """Inner products of train rows among themselves and with test rows."""

    n: int

    def among(self) -> dict[str, Float[Tensor, "n n"]]:
        """Block → inner products of the train rows; the matrices are the caller's."""
        ...

    def across(self, tests: GradientRows) -> dict[str, Float[Tensor, "n k"]]:
        """Block → inner products with test rows; the matrices are the caller's."""
        ...


class GradientKernel:
    """The kernel of the gradients themselves."""

    def __init__(self, train: GradientRows) -> None:
        self.train, self.n = train, train.n

    def among(self) -> dict[str, Float[Tensor, "n n"]]:
        """Block → GGᵀ."""
        return gram_matrices(self.train)

    def across(self, tests: GradientRows) -> dict[str, Float[Tensor, "n k"]]:
        """Block → GVᵀ."""
        return cross_grams(self.train, tests)


class DualState(State):
    """One n×n matrix a block."""

    def __init__(
        self,
        kernel: Kernel,
        dimensions: Mapping[str, int],
        weights: Float[Tensor, " n"] | None,
        traces: Mapping[str, float] | None = None,
    ) -> None:
        self.kernel, self.n = kernel, kernel.n
        self.dimensions = dict(dimensions)
        self.roots = root_weights(weights)
        self.systems: dict[str, PositiveMatrix] = {}
        for block, gram in kernel.among().items():
            gram /= self.n
            if self.roots is not None:
                scale_rows(gram, self.roots)
                gram *= self.roots.to(gram.device)
            self.systems[block] = PositiveMatrix(gram)
        own = {block: float(torch.trace(system.matrix)) for block, system in self.systems.items()}
        self.traces = dict(traces) if traces is not None else own

    def shift(self, block: str, shift: float) -> float:
        """The μ that is put on the matrix for a wanted one."""
        return shift

    def rank_needed(self, block: str) -> int:
        """The rank at which the curvature is regular."""
        return self.dimensions[block]

    def spectra(self) -> dict[str, tuple[NDArray[np.float64], int | None]]:
        """Block → (eigenvalues of K, which are C's but for zeros, None)."""
        return {block: (system.eigenvalues, None) for block, system in self.systems.items()}

    def _systems(self, shifts: Shifts) -> Iterator[tuple[str, PositiveMatrix, float]]:
        for block, system in self.systems.items():
            shift = self.shift(block, shifts[block])
            if shift == 0:
                refuse_singular(system.rank(), self.rank_needed(block), block)
            yield block, system, shift

    def effective_dimension(self, shifts: Shifts) -> float:
        """Σ_b tr K_b(K_b+μ_bI)⁻¹."""
        return sum(system.effective_dimension(shift) for _, system, shift in self._systems(shifts))

    def scores(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[str, Float[Tensor, "k n"]]]:
        """Block → τ(v_i, w_j g_j)."""
        across = self.kernel.across(tests)
        for block, system, shift in self._systems(shifts):
            right = scale_rows(across.pop(block), self.roots)
            yield block, scale_rows(system.solve(right, shift), self.roots).T

    def self_influence(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """n · diag K(K+μI)⁻¹: n times the ridge leverage scores."""
        return self.n * sum_over(system.leverages(shift) for _, system, shift in self._systems(shifts))

    def inverse_norms(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """w_j · n · diag K(K+μI)⁻²."""
        total = self.n * sum_over(system.squared_leverages(shift) for _, system, shift in self._systems(shifts))
        return total if self.roots is None else total * self.roots.to(total.device).square()

    def inverse_hvp(self, tests: GradientRows, shifts: Shifts) -> dict[str, Float[Tensor, "k d"]]:
        """(V − (1/n) V Gᵀ√W (K+μ)⁻¹ √W G)/μ, by Woodbury."""
        assert isinstance(self.kernel, GradientKernel)
        across = self.kernel.across(tests)
        results, weights = {}, {}
        for block, system, shift in self._systems(shifts):
            if shift == 0:
                raise PlanError(
                    "the dual solver gives inverse_hvp for a damping > 0 only: use solver Dense at damping 0"
                )
            right = scale_rows(across[block], self.roots)
            weights[block] = scale_rows(system.solve(right, shift), self.roots)
            results[block] = torch.cat([blocks[block].dense().double() for _, blocks in tests]).T.contiguous()
        for start, blocks in self.kernel.train:
            for block, result in results.items():
                result -= blocks[block].rmatvec(weights[block][start : start + blocks[block].n]) / self.n
        return {block: (result / self.shift(block, shifts[block])).T for block, result in results.items()}


def sum_over(parts: Iterator[Tensor]) -> Tensor:
    """The sum of tensors, at least one."""
    total = next(parts)
    for part in parts:
        total = total + part
    return total
