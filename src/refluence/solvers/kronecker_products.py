"""Scores of one layer in its eigenbasis: Σ_rc X_rc Y_rc/(Λ_rc+μ) for every pair of a test X and a train gradient Y.

Axis letters: k tests, b train examples, R rows and C columns of the layer's matrix, S pieces of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from refluence.curvature.kronecker import KroneckerBlock, Rotated, RotatedProduct, RotatedTokens, rotated
from refluence.gradients.blocks import CHUNK_ELEMENTS, GradientBlock
from refluence.gradients.outer import OuterBlock, matrix_products

ROUNDING = 8.0
"""Λ below ROUNDING·ε·μ changes 1/(Λ+μ) by no more than the products' own rounding."""

STRIPS = 16
THINNEST = 16
CACHED_ELEMENTS = 1 << 20


class LayerScores:
    """The test side of one layer, made once for all train examples.

    Args:
        basis: the layer's eigenvectors and eigenvalues.
        tests: gradients in the eigenbasis, in order.
        shift: μ.
        dtype: of the products.
    """

    def __init__(self, basis: KroneckerBlock, tests: Sequence[Rotated], shift: float, dtype: torch.dtype) -> None:
        self.basis, self.tests, self.shift, self.dtype = basis, tests, shift, dtype

    def products(self, train: GradientBlock) -> Float[Tensor, "b k"]:
        """τ of every train gradient, without weights, with every test."""
        basis = self.basis
        if basis.kind == "kronecker" and isinstance(train, OuterBlock):
            turned = rotated(train, basis, self.dtype)
            if isinstance(turned, RotatedProduct):
                if self.strips is not None:
                    return self.strips.products(turned)
                return matrix_products(turned.rows[None], turned.columns, self.matrices.flatten(1).T, False)[0]
            if isinstance(turned, RotatedTokens):
                return _token_products(turned, self.matrices)
        return train.matvec(self.solved)

    @cached_property
    def matrices(self) -> Float[Tensor, "k R C"]:
        """X/(Λ+μ)."""
        shifted = (self.basis.values + self.shift).to(self.dtype)
        return torch.cat([test.matrices() for test in self.tests]).div_(shifted)

    @cached_property
    def solved(self) -> Float[Tensor, "d k"]:
        """(C+μ)⁻¹v."""
        return self.basis.unrotate(self.matrices).T

    @cached_property
    def strips(self) -> Strips | None:
        """Products of factors, where every test is one product."""
        tests = [test for test in self.tests if isinstance(test, RotatedProduct)]
        if len(tests) < len(self.tests):
            return None
        rows, columns = torch.cat([test.rows for test in tests]), torch.cat([test.columns for test in tests])
        return Strips(rows, columns, self.basis.values, self.shift)


@dataclass(frozen=True)
class Strip:
    """Some rows of the layer's matrix, and the columns in which any of them has an eigenvalue that counts.

    Args:
        matrix: the tests there, divided by Λ + μ, column by column.
    """

    rows: Int64[Tensor, " i"]
    near: Int64[Tensor, " j"]
    far: Int64[Tensor, " h"]
    matrix: Float[Tensor, "j ki"]


class Strips:
    """Σ_rc f_r g_c e_r a_c/(Λ_rc+μ) for tests f gᵀ and train gradients e aᵀ.

    Where Λ ≪ μ the sum is (Σ_r f_r e_r)(Σ_c g_c a_c)/μ, two short inner products a pair for R·C. Eigenvalues of both
    sides decay, so the others lie under a staircase, which strips of rows cover.
    """

    def __init__(
        self, rows: Float[Tensor, "k R"], columns: Float[Tensor, "k C"], values: Float64[Tensor, "R C"], shift: float
    ) -> None:
        self.transposed = rows.shape[1] > columns.shape[1]
        if self.transposed:
            rows, columns, values = columns, rows, values.T
        self.rows, self.columns, self.shift = rows, columns, shift
        counts = values > ROUNDING * torch.finfo(rows.dtype).eps * shift
        order = counts.sum(dim=1).argsort(descending=True)
        size = max(THINNEST, -(-len(order) // STRIPS))
        self.strips = [self._strip(some, counts, values) for some in order.split(size)]

    def _strip(self, some: Tensor, counts: Tensor, values: Tensor) -> Strip:
        matters = counts[some].any(dim=0)
        near, far = matters.nonzero()[:, 0], (~matters).nonzero()[:, 0]
        inverse = 1.0 / (values[some][:, near] + self.shift)
        # (j, k, i): one matrix product with the columns of many train examples serves all tests and rows.
        matrix = self.columns.T[near][:, :, None] * self.rows[:, some]
        matrix *= inverse.T[:, None, :].to(matrix)
        return Strip(some, near, far, matrix.flatten(1))

    def products(self, train: RotatedProduct) -> Float[Tensor, "b k"]:
        """The sums for every pair."""
        rows, columns = (train.columns, train.rows) if self.transposed else (train.rows, train.columns)
        b, k = rows.shape[0], self.rows.shape[0]
        total = torch.zeros(b, k, dtype=rows.dtype, device=rows.device)
        for strip in self.strips:
            mine, fed = rows[:, strip.rows], columns[:, strip.near]
            width = mine.shape[1]
            step = max(1, CACHED_ELEMENTS // (b * width))
            for first in range(0, k, step):
                last = min(first + step, k)
                inner = (fed @ strip.matrix[:, first * width : last * width]).view(b, last - first, width)
                total[:, first:last] += torch.bmm(inner, mine[:, :, None])[:, :, 0]
            if strip.far.numel():
                outside = columns[:, strip.far] @ self.columns[:, strip.far].T
                total.addcmul_(outside, mine @ self.rows[:, strip.rows].T, value=1.0 / self.shift)
        return total


def _token_products(train: RotatedTokens, matrices: Float[Tensor, "k R C"]) -> Float[Tensor, "b k"]:
    """Sums over the rows that each example has tokens in."""
    k, _, width = matrices.shape
    total = torch.zeros(train.b, k, dtype=matrices.dtype, device=matrices.device)
    step = max(1, CHUNK_ELEMENTS // (k * width))
    for values, token, example in zip(
        train.values.split(step), train.token.split(step), train.example.split(step), strict=True
    ):
        total.index_add_(0, example, torch.einsum("ksc,sc->sk", matrices[:, token], values))
    return total
