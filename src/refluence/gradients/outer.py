"""Gradients of a weight matrix as sums of outer products, Σ_t row_t ⊗ column_t, kept as their factors.

Axis letters: n examples, t positions, R rows and C columns of the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.gradients.blocks import (
    CHUNK_ELEMENTS,
    DenseBlock,
    FactoredProjection,
    GradientBlock,
    ZeroBlock,
    add_dense_gram,
)
from refluence.gradients.factors import Dense, OneHot, Term, inner


@dataclass(frozen=True, eq=False)
class OuterBlock(GradientBlock):
    """Gradients of a matrix (R, C), row by row, and with `bias` of a vector (R) after it, Σ_t row_t.

    Its Gram for one position is (row rowᵀ)∘(column columnᵀ + bias), far less arithmetic than R·C products a pair.
    """

    terms: tuple[Term, ...]
    bias: bool = False

    def __post_init__(self) -> None:
        first = self.terms[0]
        object.__setattr__(self, "n", first.row.n)
        object.__setattr__(self, "d", self.R * self.C + (self.R if self.bias else 0))

    @property
    def R(self) -> int:
        """Rows of the matrix."""
        return self.terms[0].row.k

    @property
    def C(self) -> int:
        """Columns of the matrix."""
        return self.terms[0].column.k

    @property
    def single(self) -> tuple[Tensor, Tensor] | None:
        """(rows (n, R), columns (n, C)) where there is one term at one position in dense factors."""
        term = self.terms[0]
        if len(self.terms) > 1 or isinstance(term.row, OneHot) or isinstance(term.column, OneHot):
            return None
        if term.row.t > 1:
            return None
        return term.row.vectors()[:, 0], term.column.vectors()[:, 0]

    def _slab(self, first: int, last: int) -> Float[Tensor, "n r C"]:
        """Rows [first, last) of the matrices."""
        if (single := self.single) is not None:
            # Examples last in memory: the sketches add such chunks fastest.
            rows, columns = (factor.T.contiguous() for factor in single)
            return (rows[first:last, None, :] * columns[None, :, :]).permute(2, 0, 1)
        out: Tensor | None = None
        for term in self.terms:
            part = _slab_of(term, first, last, self.C)
            out = part if out is None else out + part
        assert out is not None
        return out

    def _bias(self) -> Float[Tensor, "n R"]:
        total: Tensor | None = None
        for term in self.terms:
            part = term.row.vectors().sum(dim=1)
            total = part if total is None else total + part
        assert total is not None
        return total

    def write(self, out: Float[Tensor, "n d"]) -> None:
        """Write the gradients into `out`."""
        weight = self.R * self.C
        if (single := self.single) is not None and out.dtype == single[0].dtype:
            rows, columns = single
            torch.mul(rows[:, :, None], columns[:, None, :], out=out[:, :weight].unflatten(1, (self.R, self.C)))
        else:
            step = max(1, CHUNK_ELEMENTS // max(1, self.n * self.C))
            for first in range(0, self.R, step):
                last = min(first + step, self.R)
                out[:, first * self.C : last * self.C] = self._slab(first, last).flatten(1)
        if self.bias:
            out[:, weight:] = self._bias()

    def chunks(self, columns: int) -> Iterator[tuple[int, Float[Tensor, "n c"]]]:
        """(first column, gradients of about `columns` columns, whole rows of the matrix)."""
        step = max(1, columns // self.C)
        for first in range(0, self.R, step):
            slab = self._slab(first, min(first + step, self.R))
            if slab.stride(0) == 1:
                yield first * self.C, slab.permute(1, 2, 0).reshape(-1, self.n).T
            else:
                yield first * self.C, slab.reshape(self.n, -1)
        if self.bias:
            yield self.R * self.C, self._bias()

    def add_gram(self, out: Float[Tensor, "n m"], other: GradientBlock) -> None:
        """Add the inner products with the gradients of `other` to `out`, by the cheaper of factors and rows."""
        if isinstance(other, ZeroBlock):
            return
        if not isinstance(other, OuterBlock):
            add_dense_gram(out, DenseBlock(self.dense()), other)
        elif (mine := self.single) is not None and (theirs := other.single) is not None:
            products = mine[1].to(out.dtype) @ theirs[1].to(out.dtype).T
            if self.bias:
                products += 1
            out.addcmul_(products, mine[0].to(out.dtype) @ theirs[0].to(out.dtype).T)
        elif self._factors_are_cheaper(other):
            self._add_gram_of_factors(out, other)
        else:
            add_dense_gram(out, self, other)

    def inner_product_work(self) -> float:
        """Multiply-adds of one inner product, the cheaper way."""
        if self.single is not None:
            return float(self.R + self.C)
        positions = sum(term.row.t for term in self.terms)
        return min(float(positions**2 * (self._lengths() + 10)), float(self.R * self.C))

    def _lengths(self) -> int:
        return sum(0 if isinstance(f, OneHot) else f.k for f in (self.terms[0].row, self.terms[0].column))

    def _factors_are_cheaper(self, other: OuterBlock) -> bool:
        """Multiply-adds by factors, two products of each pair of positions, against forming both sides and one product.

        A product of factors also writes and reads its n·t·m·s results, worth some ten multiply-adds each.
        """
        positions, others = (sum(term.row.t for term in block.terms) for block in (self, other))
        by_factors = self.n * other.n * positions * others * (self._lengths() + 10)
        by_rows = self.R * self.C * (self.n * other.n + self.n * positions + other.n * others)
        return by_factors < by_rows

    def _add_gram_of_factors(self, out: Float[Tensor, "n m"], other: OuterBlock) -> None:
        for mine in self.terms:
            for theirs in other.terms:
                step = max(1, CHUNK_ELEMENTS // max(1, mine.row.t * other.n * theirs.row.t))
                for first in range(0, self.n, step):
                    last = min(first + step, self.n)
                    products = inner(mine.column.rows(first, last), theirs.column, out.dtype)
                    if self.bias:
                        products += 1
                    products *= inner(mine.row.rows(first, last), theirs.row, out.dtype)
                    out[first:last] += products.sum(dim=(1, 3))

    def add_factored(self, out: Float[Tensor, "n m"], projection: FactoredProjection, at: int) -> None:
        """Add the gradients projected by their factors to `out`."""
        projection.add_outer([(out, self.terms)], self.bias, at)

    def squared_norms(self) -> Float[Tensor, " n"]:
        """‖g‖² of every example."""
        if (single := self.single) is not None:
            rows, columns = (x.double().square().sum(dim=1) for x in single)
            return rows * (columns + (1 if self.bias else 0))
        total = torch.zeros(self.n, dtype=torch.float64, device=self.device)
        for _, values in self.chunks(max(1, CHUNK_ELEMENTS // max(1, self.n))):
            total += values.double().square().sum(dim=1)
        return total

    def matvec(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "n k"]:
        """Inner products of every gradient with k vectors."""
        if (single := self.single) is not None:
            rows, columns = (factor.to(vectors.dtype) for factor in single)
            return matrix_products(rows[None], columns, vectors, self.bias)[0]
        total = torch.zeros(self.n, vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
        for start, values in self.chunks(max(1, CHUNK_ELEMENTS // max(1, self.n))):
            total += values.to(vectors.dtype) @ vectors[start : start + values.shape[1]]
        return total

    def add_rmatvec(self, out: Float[Tensor, "d k"], weights: Float[Tensor, "n k"]) -> None:
        """Add k weighted sums of the gradients to `out`."""
        if (single := self.single) is not None:
            rows, columns = (factor.to(weights.dtype) for factor in single)
            add_matrix_sums(out, rows[None], columns, weights[None], self.bias)
            return
        for start, values in self.chunks(max(1, CHUNK_ELEMENTS // max(1, self.n))):
            out[start : start + values.shape[1]] += values.to(weights.dtype).T @ weights

    def rows(self, start: int, stop: int) -> OuterBlock:
        """The gradients of examples [start, stop)."""
        terms = tuple(Term(term.row.rows(start, stop), term.column.rows(start, stop)) for term in self.terms)
        return OuterBlock(terms, self.bias)

    def tensors(self) -> Iterator[Tensor]:
        """What is kept in memory."""
        for term in self.terms:
            yield from term.row.tensors()
            yield from term.column.tensors()


def _slab_of(term: Term, first: int, last: int, width: int) -> Float[Tensor, "n r C"]:
    """Rows [first, last) of Σ_t row_t ⊗ column_t."""
    n = term.row.n
    if isinstance(term.row, OneHot):
        values = term.column.vectors()
        out = torch.zeros(n, last - first, width, dtype=values.dtype, device=values.device)
        inside = (term.row.index >= first) & (term.row.index < last)
        index = torch.where(inside, term.row.index - first, 0)[..., None].expand(-1, -1, width)
        return out.scatter_add_(1, index, values * inside[..., None])
    rows = term.row.vectors()[..., first:last]
    if isinstance(term.column, OneHot):
        out = torch.zeros(n, width, last - first, dtype=rows.dtype, device=rows.device)
        index = term.column.index[..., None].expand(-1, -1, last - first)
        return out.scatter_add_(1, index, rows).transpose(1, 2)
    return torch.bmm(rows.transpose(1, 2), term.column.vectors())


def merged(terms: list[Term]) -> tuple[Term, ...]:
    """The same sum with all-dense terms joined along their positions."""
    dense = [term for term in terms if isinstance(term.row, Dense) and isinstance(term.column, Dense)]
    if len(dense) < 2:
        return tuple(terms)
    row = Dense(torch.cat([term.row.vectors() for term in dense], dim=1))
    column = Dense(torch.cat([term.column.vectors() for term in dense], dim=1))
    return (Term(row, column), *(term for term in terms if term not in dense))


def matrix_products(
    rows: Float[Tensor, "q b R"], columns: Float[Tensor, "b C"], vectors: Float[Tensor, "d k"], bias: bool
) -> Float[Tensor, "q b k"]:
    """rowᵀ V_k column (+ rowᵀ v_k) for k matrices V, in b·R·C + q·b·R multiply-adds each; no gradient is formed."""
    (q, b, width), length, k = rows.shape, columns.shape[1], vectors.shape[1]
    weight = width * length
    out = torch.empty(q, b, k, dtype=vectors.dtype, device=vectors.device)
    step = max(1, CHUNK_ELEMENTS // max(1, b * min(width, length) if q == 1 else b * width))
    for first in range(0, k, step):
        some = slice(first, min(first + step, k))
        matrices = vectors[:weight, some].T.reshape(-1, width, length)
        if q == 1 and width > length:
            out[0, :, some] = (torch.matmul(rows[0], matrices) * columns).sum(dim=2).T
            continue
        # One product of two matrices for all k; a batched one would copy the columns for each.
        fed = (columns @ matrices.reshape(-1, length).T).unflatten(1, (-1, width))
        if q == 1:
            out[0, :, some] = (fed * rows[0][:, None]).sum(dim=2)
        else:
            out[:, :, some] = torch.bmm(rows.transpose(0, 1), fed.mT).transpose(0, 1)
    return out + rows @ vectors[weight:] if bias else out


def add_matrix_sums(
    total: Float[Tensor, "d k"],
    rows: Float[Tensor, "q b R"],
    columns: Float[Tensor, "b C"],
    weights: Float[Tensor, "q b k"],
    bias: bool,
) -> None:
    """Add Σ_b (Σ_q u_qbk row_qb) ⊗ column_b (and Σ row_qb u_qbk) for k sums, one matrix product for all of them."""
    (_, b, width), length, k = rows.shape, columns.shape[1], weights.shape[2]
    weight, out = width * length, total.T
    step = max(1, CHUNK_ELEMENTS // max(1, b * width))
    for first in range(0, k, step):
        some = slice(first, min(first + step, k))
        if rows.shape[0] == 1:
            combined = weights[0, :, some, None] * rows[0, :, None]
        else:
            combined = torch.bmm(weights[:, :, some].permute(1, 2, 0), rows.transpose(0, 1))  # (b, k, R)
        sums = combined.flatten(1).T @ columns
        out[some, :weight].add_(sums.unflatten(0, (-1, width)).flatten(1))
        if bias:
            out[some, weight:].add_(combined.sum(dim=0))
