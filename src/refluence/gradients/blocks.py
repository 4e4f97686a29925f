"""Per-example gradients of some parameters for a batch, and the operations that every stage uses.

A block is n gradients of length d. What is kept may be far smaller than n·d numbers; no caller needs to know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.gradients.factors import Term

CHUNK_ELEMENTS = 1 << 23


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums of many numbers of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)


@runtime_checkable
class Projection(Protocol):
    """What a block needs of a sketch; it says by `add` which of the two ways below it takes a block."""

    @property
    def m(self) -> int:
        """Rows of the projection."""
        ...

    def add(self, out: Float[Tensor, "n m"], block: GradientBlock) -> None:
        """Add G Pᵀ of a block to `out`, by the block's `add_sketch` or its `add_factored`."""
        ...


@runtime_checkable
class ColumnProjection(Protocol):
    """A projection of columns: chunks of them are added to the result in any order."""

    @property
    def chunk_rows(self) -> int:
        """How many gradients at a time suit it."""
        ...

    @property
    def chunk_columns(self) -> int:
        """How many columns at a time suit it."""
        ...

    def accumulate(self, out: Float[Tensor, "n m"], columns: Float[Tensor, "n c"], start: int) -> None:
        """Add `columns` @ P[:, start : start + c]ᵀ to `out`."""
        ...


@runtime_checkable
class FactoredProjection(Protocol):
    """A projection of sums of outer products, each layer by itself; `at` is the layer's first column in the whole."""

    def add_outer(self, parts: Sequence[tuple[Float[Tensor, "n m"], tuple[Term, ...]]], bias: bool, at: int) -> None:
        """Add the projections of the outer products of each part to its output; the parts may share factors."""
        ...

    def add_rows(self, out: Float[Tensor, "n m"], rows: Float[Tensor, "n e"], at: int) -> None:
        """Add the projections of a layer's gradients, kept as rows, to `out`."""
        ...


class GradientBlock(ABC):
    """n per-example gradients of length d."""

    n: int
    d: int

    @abstractmethod
    def write(self, out: Float[Tensor, "n d"]) -> None:
        """Write the gradients into `out`, which may be strided."""

    @abstractmethod
    def chunks(self, columns: int) -> Iterator[tuple[int, Float[Tensor, "n c"]]]:
        """(first column, gradients of about `columns` columns); what is left out is zero, no bound depends on n."""

    @abstractmethod
    def add_gram(self, out: Float[Tensor, "n m"], other: GradientBlock) -> None:
        """Add the inner products with the gradients of `other` to `out`, computed in the dtype of `out`."""

    @abstractmethod
    def squared_norms(self) -> Float[Tensor, " n"]:
        """‖g‖² of every example, in float64."""

    @abstractmethod
    def matvec(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "n k"]:
        """Inner products of every gradient with k vectors."""

    @abstractmethod
    def add_rmatvec(self, out: Float[Tensor, "d k"], weights: Float[Tensor, "n k"]) -> None:
        """Add k weighted sums of the gradients to `out`, in its dtype, which is that of the weights."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> GradientBlock:
        """The gradients of examples [start, stop)."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """What is kept in memory."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the gradients have when formed."""
        return next(tensor.dtype for tensor in self.tensors() if tensor.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return next(self.tensors()).device

    @property
    def nbytes(self) -> int:
        """Bytes kept in memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def dense(self) -> Float[Tensor, "n d"]:
        """The gradients as rows."""
        out = torch.empty(self.n, self.d, dtype=self.dtype, device=self.device)
        self.write(out)
        return out

    def gram(self, other: GradientBlock, dtype: torch.dtype = torch.float64) -> Float[Tensor, "n m"]:
        """Inner products with the gradients of `other`, computed in `dtype`."""
        out = torch.zeros(self.n, other.n, dtype=dtype, device=self.device)
        self.add_gram(out, other)
        return out

    def rmatvec(self, weights: Float[Tensor, "n k"]) -> Float[Tensor, "d k"]:
        """k weighted sums of the gradients, each contiguous."""
        out = torch.zeros(weights.shape[1], self.d, dtype=weights.dtype, device=weights.device).T
        self.add_rmatvec(out, weights)
        return out

    def sketch(self, projection: Projection) -> Float[Tensor, "n m"]:
        """Every gradient projected: G Pᵀ."""
        out = torch.zeros(self.n, projection.m, dtype=accumulation_dtype(self.dtype), device=self.device)
        projection.add(out, self)
        return out

    def add_factored(self, out: Float[Tensor, "n m"], projection: FactoredProjection, at: int) -> None:
        """Add the projections of the layer whose first column is `at` in the whole to `out`."""
        projection.add_rows(out, self.dense().to(out.dtype), at)

    def add_sketch(self, out: Float[Tensor, "n m"], projection: ColumnProjection, offset: int) -> None:
        """Add G P[:, offset : offset + d]ᵀ to `out`, some columns at a time."""
        for first in range(0, self.n, projection.chunk_rows):
            last = min(first + projection.chunk_rows, self.n)
            for start, columns in self.rows(first, last).chunks(projection.chunk_columns):
                projection.accumulate(out[first:last], columns.to(out.dtype), offset + start)

    def inner_product_work(self) -> float:
        """Multiply-adds of one inner product of two gradients."""
        return float(self.d)

    def nonfinite_row(self) -> int | None:
        """The first example with a NaN or Inf, None where all is finite."""
        for tensor in self.tensors():
            # A finite sum rules NaN and Inf out in one cheap pass.
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
                bad = ~torch.isfinite(tensor.reshape(self.n, -1)).all(dim=1)
                if bool(bad.any()):
                    return int(bad.nonzero()[0])
        return None


@dataclass(frozen=True, eq=False)
class DenseBlock(GradientBlock):
    """Gradients kept as rows."""

    values: Float[Tensor, "n d"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", self.values.shape[0])
        object.__setattr__(self, "d", self.values.shape[1])

    def write(self, out: Float[Tensor, "n d"]) -> None:
        """Write the gradients into `out`."""
        out.copy_(self.values)

    def dense(self) -> Float[Tensor, "n d"]:
        """The gradients as rows."""
        return self.values

    def chunks(self, columns: int) -> Iterator[tuple[int, Float[Tensor, "n c"]]]:
        """(first column, gradients of `columns` columns)."""
        for start in range(0, self.d, columns):
            yield start, self.values[:, start : start + columns]

    def add_gram(self, out: Float[Tensor, "n m"], other: GradientBlock) -> None:
        """Add the inner products with the gradients of `other` to `out`."""
        add_dense_gram(out, self, other)

    def squared_norms(self) -> Float[Tensor, " n"]:
        """‖g‖² of every example."""
        total = torch.zeros(self.n, dtype=torch.float64, device=self.device)
        for _, columns in self.chunks(max(1, CHUNK_ELEMENTS // max(1, self.n))):
            total += columns.double().square().sum(dim=1)
        return total

    def matvec(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "n k"]:
        """Inner products of every gradient with k vectors."""
        return self.values.to(vectors.dtype) @ vectors

    def add_rmatvec(self, out: Float[Tensor, "d k"], weights: Float[Tensor, "n k"]) -> None:
        """Add k weighted sums of the gradients to `out`."""
        out.T.addmm_(weights.T, self.values.to(weights.dtype))

    def rows(self, start: int, stop: int) -> DenseBlock:
        """The gradients of examples [start, stop)."""
        return DenseBlock(self.values[start:stop])

    def tensors(self) -> Iterator[Tensor]:
        """What is kept in memory."""
        yield self.values


def add_dense_gram(out: Float[Tensor, "n m"], left: GradientBlock, right: GradientBlock) -> None:
    """Add the inner products to `out` by forming both sides, some columns at a time."""
    if isinstance(left, ZeroBlock) or isinstance(right, ZeroBlock):
        return
    columns = max(1, CHUNK_ELEMENTS // max(left.n, right.n))
    if type(left) is not type(right):
        left, right = DenseBlock(left.dense()), DenseBlock(right.dense())
    for (start, x), (also, y) in zip(left.chunks(columns), right.chunks(columns), strict=True):
        assert start == also, "chunks of two blocks of the same parameters have the same bounds"
        out.addmm_(x.to(out.dtype), y.to(out.dtype).T)


@dataclass(frozen=True, eq=False)
class ZeroBlock(GradientBlock):
    """Gradients of a parameter that the objective does not use: all zero, and nothing is kept or computed."""

    n: int
    d: int
    like: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameter."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameter is."""
        return self.like.device

    def write(self, out: Float[Tensor, "n d"]) -> None:
        """Write zeros into `out`."""
        out.zero_()

    def chunks(self, columns: int) -> Iterator[tuple[int, Float[Tensor, "n c"]]]:
        """Nothing: zeros add nothing to any sum."""
        return iter(())

    def add_gram(self, out: Float[Tensor, "n m"], other: GradientBlock) -> None:
        """Nothing to add."""

    def add_factored(self, out: Float[Tensor, "n m"], projection: FactoredProjection, at: int) -> None:
        """Nothing to add."""

    def squared_norms(self) -> Float[Tensor, " n"]:
        """Zeros."""
        return torch.zeros(self.n, dtype=torch.float64, device=self.device)

    def matvec(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "n k"]:
        """Zeros."""
        return vectors.new_zeros(self.n, vectors.shape[1])

    def add_rmatvec(self, out: Float[Tensor, "d k"], weights: Float[Tensor, "n k"]) -> None:
        """Nothing to add."""

    def rows(self, start: int, stop: int) -> ZeroBlock:
        """The same zeros for fewer examples."""
        return ZeroBlock(min(stop, self.n) - start, self.d, self.like)

    def tensors(self) -> Iterator[Tensor]:
        """Nothing is kept."""
        return iter(())

    def inner_product_work(self) -> float:
        """None."""
        return 0.0
