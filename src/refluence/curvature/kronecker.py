"""A layer's curvature in an eigenbasis that is a Kronecker product: (Q_E ⊗ Q_A) diag(Λ) (Q_E ⊗ Q_A)ᵀ.

Axis letters: b examples, k vectors, t positions, S pieces of gradients, R rows and C columns of the layer's matrix, the
bias counted as its last column; a layer without a Kronecker form is one row, R = 1. r and c: how many eigenvectors
there are of rows and columns, R and C unless the factors are sketched (`sketched_factors`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from refluence.curvature.layer_factors import Covariances
from refluence.gradients.blocks import CHUNK_ELEMENTS, GradientBlock
from refluence.gradients.factors import Factor, OneHot
from refluence.gradients.fan import FanBlock
from refluence.gradients.outer import OuterBlock

KINDS = ("kronecker", "dense", "diagonal", "zero")


@dataclass(frozen=True)
class KroneckerBlock:
    """Eigenvectors of rows and columns, and eigenvalues, of one layer.

    Args:
        kind: "kronecker"; or with R = 1 "dense", "diagonal", or "zero" for a layer that the objective does not use.
        bias: whether the last column is the layer's bias, whose entries come after those of the weight.
        rows: Q_E, None for the identity.
        columns: Q_A, None for the identity.
        values: Λ.
    """

    kind: str
    bias: bool
    rows: Float[Tensor, "R r"] | None
    columns: Float[Tensor, "C c"] | None
    values: Float64[Tensor, "r c"]

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        sides = zip((self.rows, self.columns), self.values.shape, strict=True)
        R, C = (size if basis is None else basis.shape[0] for basis, size in sides)
        return R, C

    @property
    def d(self) -> int:
        """The number of parameters."""
        R, C = self.shape
        return R * C

    def matrices(self, vectors: Float[Tensor, "k d"]) -> Float[Tensor, "k R C"]:
        """Vectors over the layer's parameters as matrices, the bias last."""
        R, C = self.shape
        if not self.bias:
            return vectors.reshape(-1, R, C)
        weight = R * (C - 1)
        return torch.cat([vectors[:, :weight].reshape(-1, R, C - 1), vectors[:, weight:, None]], dim=2)

    def vectors(self, matrices: Float[Tensor, "k R C"]) -> Float[Tensor, "k d"]:
        """The inverse of `matrices`."""
        if not self.bias:
            return matrices.flatten(1)
        return torch.cat([matrices[:, :, :-1].flatten(1), matrices[:, :, -1]], dim=1)

    def rotate_rows(self, rows: Float[Tensor, "*s R"]) -> Float[Tensor, "*s r"]:
        """rᵀQ_E."""
        return rows if self.rows is None else rows @ self.rows.to(rows.dtype)

    def rotate_columns(self, columns: Float[Tensor, "*s w"]) -> Float[Tensor, "*s c"]:
        """(a, 1)ᵀQ_A with a bias, else aᵀQ_A."""
        basis = self.columns
        if basis is None:
            return columns
        basis = basis.to(columns.dtype)
        return columns @ basis[:-1] + basis[-1] if self.bias else columns @ basis

    def row_products(self, factor: Factor, dtype: torch.dtype) -> Float[Tensor, "n t r"]:
        """eᵀQ_E of every vector."""
        return factor.vectors().to(dtype) if self.rows is None else factor.products(self.rows.to(dtype))

    def column_products(self, factor: Factor, dtype: torch.dtype) -> Float[Tensor, "n t c"]:
        """ãᵀQ_A of every vector."""
        if self.columns is None:
            return factor.vectors().to(dtype)
        basis = self.columns.to(dtype)
        return factor.products(basis[:-1]) + basis[-1] if self.bias else factor.products(basis)

    def rotate(self, vectors: Float[Tensor, "k d"]) -> Float[Tensor, "k r c"]:
        """Q_EᵀVQ_A."""
        matrices = self.matrices(vectors)
        if self.columns is not None:
            matrices = matrices @ self.columns.to(vectors.dtype)
        return matrices if self.rows is None else self.rows.to(vectors.dtype).T @ matrices

    def unrotate(self, matrices: Float[Tensor, "k r c"]) -> Float[Tensor, "k d"]:
        """Q_E X Q_Aᵀ as vectors."""
        if self.rows is not None:
            matrices = self.rows.to(matrices.dtype) @ matrices
        if self.columns is not None:
            matrices = matrices @ self.columns.to(matrices.dtype).T
        return self.vectors(matrices)

    def with_values(self, values: Float64[Tensor, "r c"]) -> KroneckerBlock:
        """The same basis with other eigenvalues."""
        return replace(self, values=values)


def kronecker_block(found: Covariances, n: int, dtype: torch.dtype) -> KroneckerBlock:
    """E ⊗ A with E = Σ w r rᵀ/n and A = Σ w c cᵀ/Σw, their eigenvectors in `dtype`.

    For one outer product an example this is (1/n) Σ w (rrᵀ) ⊗ (ccᵀ) where rows and columns are independent.
    """
    rows, row_values = _eigenvectors(found.rows / n, dtype)
    columns, column_values = _eigenvectors(found.columns / found.count if found.count else found.columns, dtype)
    return KroneckerBlock("kronecker", found.bias, rows, columns, torch.outer(row_values, column_values))


def dense_block(moment: Float64[Tensor, "d d"], dtype: torch.dtype) -> KroneckerBlock:
    """A whole matrix, by its eigenvectors."""
    vectors, values = _eigenvectors(moment, dtype)
    return KroneckerBlock("dense", False, None, vectors, values[None])


def _eigenvectors(moment: Float64[Tensor, "..."], dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    if moment.ndim == 1:
        return None, moment
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    return vectors.to(dtype), values.clamp_(min=0.0)


class Rotated(ABC):
    """b gradients of one layer in the eigenbasis, X_i = Q_EᵀF_iQ_A, in whatever form is cheap."""

    @abstractmethod
    def matrices(self) -> Float[Tensor, "b r c"]:
        """X."""

    @abstractmethod
    def norms(self, weights: Float[Tensor, "r c"]) -> Float64[Tensor, " b"]:
        """Σ_jk W_jk X_ijk² of every example."""

    @abstractmethod
    def moment(self, weights: Float[Tensor, " b"] | None) -> Float64[Tensor, "r c"]:
        """Σ_i w_i X_ijk²."""


@dataclass(frozen=True)
class RotatedProduct(Rotated):
    """X = r cᵀ, never formed for sums of squares."""

    rows: Float[Tensor, "b r"]
    columns: Float[Tensor, "b c"]

    def matrices(self) -> Float[Tensor, "b r c"]:
        """X."""
        return self.rows[:, :, None] * self.columns[:, None, :]

    def norms(self, weights: Float[Tensor, "r c"]) -> Float64[Tensor, " b"]:
        """(r²)ᵀ W c²."""
        return ((self.rows.square() @ weights.to(self.rows)) * self.columns.square()).sum(dim=1).double()

    def moment(self, weights: Float[Tensor, " b"] | None) -> Float64[Tensor, "r c"]:
        """(wr²)ᵀc², one matrix product."""
        squares = self.rows.square()
        if weights is not None:
            squares *= weights[:, None].to(squares)
        return (squares.T @ self.columns.square()).double()


@dataclass(frozen=True)
class RotatedTokens(Rotated):
    """X with the rows that an example has tokens in: piece s is row `token[s]` of example `example[s]`."""

    example: Int64[Tensor, " S"]
    token: Int64[Tensor, " S"]
    values: Float[Tensor, "S c"]
    b: int
    R: int

    def matrices(self) -> Float[Tensor, "b r c"]:
        """X."""
        out = self.values.new_zeros(self.b * self.R, self.values.shape[1])
        return out.index_copy_(0, self.example * self.R + self.token, self.values).unflatten(0, (self.b, self.R))

    def norms(self, weights: Float[Tensor, "r c"]) -> Float64[Tensor, " b"]:
        """Sums over the tokens of each example."""
        sums = (self.values.square() * weights.to(self.values)[self.token]).sum(dim=1).double()
        return sums.new_zeros(self.b).index_add_(0, self.example, sums)

    def moment(self, weights: Float[Tensor, " b"] | None) -> Float64[Tensor, "r c"]:
        """Sums over the examples of each token."""
        squares = self.values.double().square()
        if weights is not None:
            squares *= weights.to(squares)[self.example][:, None]
        return squares.new_zeros(self.R, squares.shape[1]).index_add_(0, self.token, squares)


@dataclass(frozen=True)
class RotatedRows(Rotated):
    """X made some examples at a time, by rotating the rows or, where that is less arithmetic, their factors."""

    block: GradientBlock
    basis: KroneckerBlock
    dtype: torch.dtype

    def _chunks(self) -> Iterator[tuple[slice, Float[Tensor, "s r c"]]]:
        R, C = self.basis.shape
        factors = self._factors()
        step = max(1, CHUNK_ELEMENTS // (R * C + (factors[0].t * (R + C) if factors is not None else 0)))
        for first in range(0, self.block.n, step):
            span = slice(first, min(first + step, self.block.n))
            if factors is None:
                yield span, self.basis.rotate(self.block.rows(span.start, span.stop).dense().to(self.dtype))
                continue
            rows, columns = (factor.rows(span.start, span.stop) for factor in factors)
            turned = self.basis.row_products(rows, self.dtype), self.basis.column_products(columns, self.dtype)
            yield span, turned[0].transpose(1, 2) @ turned[1]

    def _factors(self) -> tuple[Factor, Factor] | None:
        block, (R, C), (r, c) = self.block, self.basis.shape, self.basis.values.shape
        if self.basis.kind != "kronecker" or not isinstance(block, OuterBlock) or len(block.terms) > 1:
            return None
        row, column = block.terms[0].row, block.terms[0].column
        if any(isinstance(f, OneHot) and Q is None for f, Q in ((row, self.basis.rows), (column, self.basis.columns))):
            return None
        # A unit vector picks a row of the basis; other rows are multiplied by it.
        turns = 0 if isinstance(row, OneHot) else R * r
        return (row, column) if row.t * (turns + C * c) < R * c * (C + r) else None

    def matrices(self) -> Float[Tensor, "b r c"]:
        """X."""
        return torch.cat([matrices for _, matrices in self._chunks()])

    def norms(self, weights: Float[Tensor, "r c"]) -> Float64[Tensor, " b"]:
        """Σ_jk W_jk X_ijk²."""
        flat = weights.to(self.dtype).flatten()
        return torch.cat([(x.square().flatten(1) @ flat).double() for _, x in self._chunks()])

    def moment(self, weights: Float[Tensor, " b"] | None) -> Float64[Tensor, "r c"]:
        """Σ_i w_i X_ijk²."""
        total = torch.zeros_like(self.basis.values)
        for span, x in self._chunks():
            if weights is None:
                total += x.square().sum(dim=0).double()
            else:
                total += torch.einsum("b,brc->rc", weights[span].to(x), x.square()).double()
        return total


def rotated(block: GradientBlock, basis: KroneckerBlock, dtype: torch.dtype) -> Rotated:
    """One gradient an example, in the eigenbasis of its layer, computed in `dtype`."""
    if basis.kind == "kronecker" and isinstance(block, OuterBlock):
        if (single := block.single) is not None:
            rows, columns = (factor.to(dtype) for factor in single)
            return RotatedProduct(basis.rotate_rows(rows), basis.rotate_columns(columns))
        if basis.rows is None and not block.bias and all(isinstance(term.row, OneHot) for term in block.terms):
            return _rotated_tokens(block, basis, dtype)
    return RotatedRows(block, basis, dtype)


def _rotated_tokens(block: OuterBlock, basis: KroneckerBlock, dtype: torch.dtype) -> RotatedTokens:
    """The values of equal tokens of an example added."""
    places, values = [], []
    for term in block.terms:
        assert isinstance(term.row, OneHot)
        index = term.row.index
        examples = torch.arange(block.n, device=index.device)[:, None]
        places.append((index + examples * block.R).flatten())
        values.append(term.column.vectors().to(dtype).flatten(0, 1))
    unique, inverse = torch.cat(places).unique(return_inverse=True)
    columns = torch.cat(values)
    summed = columns.new_zeros(unique.numel(), columns.shape[1]).index_add_(0, inverse, columns)
    return RotatedTokens(unique // block.R, unique % block.R, basis.rotate_columns(summed), block.n, block.R)


def squared_moment(
    block: GradientBlock, basis: KroneckerBlock, weights: Float[Tensor, " b"] | None, dtype: torch.dtype
) -> Float64[Tensor, "r c"]:
    """Σ_i w_i Σ_q X_iq² of a batch: n times the eigenvalues of EK-FAC (George et al. 2018, eq. 7)."""
    if not isinstance(block, FanBlock):
        return rotated(block, basis, dtype).moment(weights)
    if basis.kind == "kronecker" and (shared := block.shared) is not None:
        # The columns are rotated once for all q.
        squares = basis.rotate_rows(shared.rows.to(dtype)).square().sum(dim=0)
        if weights is not None:
            squares *= weights[:, None].to(squares)
        return (squares.T @ basis.rotate_columns(shared.columns.to(dtype)).square()).double()
    return sum((rotated(part, basis, dtype).moment(weights) for part in block.parts), torch.zeros_like(basis.values))
