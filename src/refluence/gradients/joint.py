"""Blocks side by side, in the order of the model's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.gradients.blocks import FactoredProjection, GradientBlock


@dataclass(frozen=True, eq=False)
class JointBlock(GradientBlock):
    """Several blocks side by side; `columns[i]` says where each stretch of block i's columns goes in the whole.

    A stretch is (first column in the block, length, first column in the whole): weight and bias of one layer are one
    block, but need not be neighbours in the model's order of parameters.
    """

    blocks: tuple[GradientBlock, ...]
    columns: tuple[tuple[tuple[int, int, int], ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", self.blocks[0].n)
        object.__setattr__(self, "d", sum(block.d for block in self.blocks))

    def write(self, out: Float[Tensor, "n d"]) -> None:
        """Write the gradients into `out`."""
        for block, stretches in zip(self.blocks, self.columns, strict=True):
            if _contiguous(stretches):
                block.write(out[:, stretches[0][2] : stretches[0][2] + block.d])
                continue
            values = block.dense()
            for own, length, whole in stretches:
                out[:, whole : whole + length] = values[:, own : own + length]

    def chunks(self, columns: int) -> Iterator[tuple[int, Float[Tensor, "n c"]]]:
        """(first column, gradients of about `columns` columns)."""
        for block, stretches in zip(self.blocks, self.columns, strict=True):
            for start, values in block.chunks(columns):
                for own, length, whole in stretches:
                    first, last = max(own, start), min(own + length, start + values.shape[1])
                    if first < last:
                        yield whole + first - own, values[:, first - start : last - start]

    def add_gram(self, out: Float[Tensor, "n m"], other: GradientBlock) -> None:
        """Add the inner products with the gradients of `other` to `out`."""
        assert isinstance(other, JointBlock)
        for mine, theirs in zip(self.blocks, other.blocks, strict=True):
            mine.add_gram(out, theirs)

    def add_factored(self, out: Float[Tensor, "n m"], projection: FactoredProjection, at: int) -> None:
        """Add the projections of every layer by itself to `out`."""
        for block, stretches in zip(self.blocks, self.columns, strict=True):
            block.add_factored(out, projection, at + stretches[0][2])

    def squared_norms(self) -> Float[Tensor, " n"]:
        """‖g‖² of every example."""
        return torch.stack([block.squared_norms() for block in self.blocks]).sum(dim=0)

    def matvec(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "n k"]:
        """Inner products of every gradient with k vectors."""
        total = torch.zeros(self.n, vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
        for block, stretches in zip(self.blocks, self.columns, strict=True):
            total += block.matvec(gather(vectors, stretches))
        return total

    def add_rmatvec(self, out: Float[Tensor, "d k"], weights: Float[Tensor, "n k"]) -> None:
        """Add k weighted sums of the gradients to `out`."""
        for block, stretches in zip(self.blocks, self.columns, strict=True):
            if _contiguous(stretches):
                block.add_rmatvec(gather(out, stretches), weights)
                continue
            own = block.rmatvec(weights)
            for start, length, at in stretches:
                out[at : at + length] += own[start : start + length]

    def rows(self, start: int, stop: int) -> JointBlock:
        """The gradients of examples [start, stop)."""
        return JointBlock(tuple(block.rows(start, stop) for block in self.blocks), self.columns)

    def tensors(self) -> Iterator[Tensor]:
        """What is kept in memory."""
        for block in self.blocks:
            yield from block.tensors()

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of the blocks."""
        return reduce(torch.promote_types, (block.dtype for block in self.blocks))

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self.blocks[0].device

    def inner_product_work(self) -> float:
        """Multiply-adds of one inner product of two gradients."""
        return sum(block.inner_product_work() for block in self.blocks)


Stretches = Sequence[tuple[int, int, int]]


def gather(whole: Float[Tensor, "d k"], stretches: Stretches) -> Float[Tensor, "e k"]:
    """The rows of one block, in its own order, of vectors over the whole."""
    if _contiguous(stretches):
        return whole[stretches[0][2] : stretches[-1][2] + stretches[-1][1]]
    return torch.cat([whole.T[:, at : at + length] for _, length, at in stretches], dim=1).T


def scatter(whole: Float[Tensor, "d k"], own: Float[Tensor, "e k"], stretches: Stretches) -> None:
    """Write vectors over one block into their rows of vectors over the whole."""
    for start, length, at in stretches:
        whole[at : at + length] = own[start : start + length]


def _contiguous(stretches: Stretches) -> bool:
    return all(whole - own == stretches[0][2] - stretches[0][0] for own, _, whole in stretches)
