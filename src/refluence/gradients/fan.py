"""Several gradients an example, one for each direction of the model's output, that share what the model was fed.

Axis letters: q gradients an example, b examples, k right-hand sides, R rows and C columns of a weight matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.gradients.blocks import ColumnProjection, FactoredProjection, GradientBlock, ZeroBlock
from refluence.gradients.factors import OneHot
from refluence.gradients.outer import OuterBlock, add_matrix_sums, matrix_products


@dataclass(frozen=True)
class Shared:
    """Factors of outer products whose columns the q gradients of an example share: rows (q, b, R), columns (b, C)."""

    rows: Float[Tensor, "q b R"]
    columns: Float[Tensor, "b C"]
    bias: bool


@dataclass(frozen=True, eq=False)
class FanBlock(GradientBlock):
    """The rows of its parts one after the other: row c·b + i is gradient c of example i."""

    parts: tuple[GradientBlock, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", sum(part.n for part in self.parts))
        object.__setattr__(self, "d", self.parts[0].d)

    @cached_property
    def shared(self) -> Shared | None:
        """The factors where every part is one outer product with the same columns."""
        parts = self.parts
        if not all(isinstance(part, OuterBlock) and len(part.terms) == 1 for part in parts):
            return None
        first = parts[0]
        assert isinstance(first, OuterBlock)
        column = first.terms[0].column
        if isinstance(column, OneHot) or column.t != 1 or isinstance(first.terms[0].row, OneHot):
            return None
        if any(part.terms[0].column is not column for part in parts if isinstance(part, OuterBlock)):
            return None
        rows = torch.stack([part.terms[0].row.vectors()[:, 0] for part in parts if isinstance(part, OuterBlock)])
        return Shared(rows, column.vectors()[:, 0], first.bias)

    def _spans(self) -> Iterator[tuple[slice, GradientBlock]]:
        start = 0
        for part in self.parts:
            yield slice(start, start + part.n), part
            start += part.n

    def write(self, out: Float[Tensor, "n d"]) -> None:
        """Write the gradients into `out`."""
        for span, part in self._spans():
            part.write(out[span])

    def chunks(self, columns: int) -> Iterator[tuple[int, Float[Tensor, "n c"]]]:
        """(first column, gradients of about `columns` columns)."""
        for pieces in zip(*(part.chunks(columns) for part in self.parts), strict=True):
            yield pieces[0][0], torch.cat([values for _, values in pieces])

    def add_gram(self, out: Float[Tensor, "n m"], other: GradientBlock) -> None:
        """Add the inner products with the gradients of `other` to `out`."""
        if isinstance(other, ZeroBlock):
            return
        mine = self.shared
        theirs = shared_of(other)
        if mine is not None and theirs is not None:
            _add_shared_gram(out, mine, theirs)
            return
        for span, part in self._spans():
            if isinstance(other, FanBlock):
                for across, piece in other._spans():
                    part.add_gram(out[span, across], piece)
            else:
                part.add_gram(out[span], other)

    def add_sketch(self, out: Float[Tensor, "n m"], projection: ColumnProjection, offset: int) -> None:
        """Add G P[:, offset : offset + d]ᵀ to `out`."""
        for span, part in self._spans():
            part.add_sketch(out[span], projection, offset)

    def add_factored(self, out: Float[Tensor, "n m"], projection: FactoredProjection, at: int) -> None:
        """Add the gradients projected by their factors to `out`; what is shared is projected once."""
        outer = [(out[span], part) for span, part in self._spans() if isinstance(part, OuterBlock)]
        if outer:
            projection.add_outer([(some, part.terms) for some, part in outer], outer[0][1].bias, at)
        for span, part in self._spans():
            if not isinstance(part, OuterBlock):
                part.add_factored(out[span], projection, at)

    def squared_norms(self) -> Float[Tensor, " n"]:
        """‖g‖² of every row."""
        return torch.cat([part.squared_norms() for part in self.parts])

    def matvec(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "n k"]:
        """Inner products of every gradient with k vectors; the products with what is shared are made once."""
        if (shared := self.shared) is None:
            return torch.cat([part.matvec(vectors) for part in self.parts])
        rows, columns = shared.rows.to(vectors.dtype), shared.columns.to(vectors.dtype)
        return matrix_products(rows, columns, vectors, shared.bias).flatten(0, 1)

    def add_rmatvec(self, out: Float[Tensor, "d k"], weights: Float[Tensor, "n k"]) -> None:
        """Add k weighted sums of the gradients to `out`."""
        if (shared := self.shared) is None:
            for span, part in self._spans():
                part.add_rmatvec(out, weights[span])
            return
        rows, columns = shared.rows.to(weights.dtype), shared.columns.to(weights.dtype)
        add_matrix_sums(out, rows, columns, weights.reshape(*rows.shape[:2], -1), shared.bias)

    def rows(self, start: int, stop: int) -> GradientBlock:
        """Rows [start, stop)."""
        kept = []
        for span, part in self._spans():
            first, last = max(start, span.start), min(stop, span.stop)
            if first < last:
                kept.append(part.rows(first - span.start, last - span.start))
        return kept[0] if len(kept) == 1 else FanBlock(tuple(kept))

    def tensors(self) -> Iterator[Tensor]:
        """What is kept in memory, what is shared once."""
        seen: set[int] = set()
        for part in self.parts:
            for tensor in part.tensors():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parts."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self.parts[0].device

    def nonfinite_row(self) -> int | None:
        """The first example with a NaN or Inf in any of its gradients, None where all is finite."""
        found = [row for part in self.parts if (row := part.nonfinite_row()) is not None]
        return min(found, default=None)

    def inner_product_work(self) -> float:
        """Multiply-adds of one inner product of two gradients."""
        return sum(part.inner_product_work() for part in self.parts) / len(self.parts)


def shared_of(block: GradientBlock) -> Shared | None:
    """The factors of a block of one outer product an example, None of any other."""
    if isinstance(block, FanBlock):
        return block.shared
    if isinstance(block, OuterBlock) and (single := block.single) is not None:
        return Shared(single[0][None], single[1], block.bias)
    return None


def _add_shared_gram(out: Float[Tensor, "n m"], mine: Shared, theirs: Shared) -> None:
    """The products of the columns are made once for all pairs of rows of two examples."""
    columns = mine.columns.to(out.dtype) @ theirs.columns.to(out.dtype).T
    if mine.bias:
        columns += 1
    right = theirs.rows.flatten(0, 1).to(out.dtype)
    q, s = mine.rows.shape[0], theirs.rows.shape[0]
    tiled = columns.repeat(1, s)
    for c in range(q):
        span = slice(c * columns.shape[0], (c + 1) * columns.shape[0])
        out[span].addcmul_(tiled, mine.rows[c].to(out.dtype) @ right.T)
