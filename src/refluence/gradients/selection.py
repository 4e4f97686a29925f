"""Gradients of any rows of a block, in any order."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Int64
from torch import Tensor

from refluence.gradients.blocks import DenseBlock, GradientBlock, ZeroBlock
from refluence.gradients.factors import Dense, Factor, OneHot, Patches, Term
from refluence.gradients.fan import FanBlock
from refluence.gradients.joint import JointBlock
from refluence.gradients.outer import OuterBlock


def select_rows(block: GradientBlock, rows: Int64[Tensor, " b"]) -> GradientBlock:
    """The gradients of the given rows, in this order; of a `FanBlock` rows of the same examples, part by part."""
    return _select_rows(block, rows, {})


def _select_rows(block: GradientBlock, rows: Int64[Tensor, " b"], factors: dict[int, Factor]) -> GradientBlock:
    """The gradients of any rows, in this order; `factors` keeps those that several blocks share shared."""
    if isinstance(block, JointBlock):
        return JointBlock(tuple(select_rows(part, rows) for part in block.blocks), block.columns)
    if isinstance(block, FanBlock):
        return _select_fan(block, rows)
    if isinstance(block, OuterBlock):
        terms = (Term(_select(t.row, rows, factors), _select(t.column, rows, factors)) for t in block.terms)
        return OuterBlock(tuple(terms), block.bias)
    if isinstance(block, ZeroBlock):
        return ZeroBlock(rows.numel(), block.d, block.like)
    return DenseBlock(block.dense()[rows])


def _select_fan(block: FanBlock, rows: Int64[Tensor, " b"]) -> GradientBlock:
    """The rows are of whole examples, part by part, so each part keeps the same ones."""
    size, count = block.parts[0].n, rows.numel() // len(block.parts)
    factors: dict[int, Factor] = {}
    parts = zip(block.parts, rows.split(count), strict=True)
    return FanBlock(tuple(_select_rows(part, own - c * size, factors) for c, (part, own) in enumerate(parts)))


def _select(factor: Factor, rows: Int64[Tensor, " b"], factors: dict[int, Factor]) -> Factor:
    if id(factor) not in factors:
        if isinstance(factor, OneHot):
            factors[id(factor)] = replace(factor, index=factor.index[rows])
        elif isinstance(factor, Patches):
            factors[id(factor)] = replace(factor, images=factor.images[rows])
        else:
            factors[id(factor)] = Dense(factor.vectors()[rows])
    return factors[id(factor)]
