"""Gram matrices of per-example gradients: K = GGᵀ/n of the train rows, and GVᵀ with test rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.gradients.blocks import DenseBlock
from refluence.gradients.joint import JointBlock
from refluence.gradients.rows import BlocksOfBatch, GradientRows
from refluence.progress import track


def gram_matrices(rows: GradientRows, groups: Sequence[str] | None = None) -> dict[str, Float[Tensor, "N N"]]:
    """Group → GGᵀ in float64 of all N = n·q gradients, half of it computed and mirrored.

    With q > 1 gradients an example the rows are ordered batch by batch, and in a batch as in its blocks.

    Where the gradients do not fit the memory together, each stretch that fits meets the earlier rows in another pass.
    """
    groups = rows.groups if groups is None else groups
    if rows.parts is not None:
        found = rows.parts.gram(rows.role, _gram_of_parts, groups)
        return {group: gram.to(rows.device) for group, gram in found.items()}
    size = rows.n * rows.q
    grams = {g: torch.empty(size, size, dtype=torch.float64, device=rows.device) for g in groups}
    for tile in track(rows.tiles(), "Gram matrix", enabled=rows.progress):
        for i, (start, blocks) in enumerate(tile):
            for earlier, others in tile[: i + 1]:
                _fill(grams, rows.q, start, blocks, earlier, others)
        first = tile[0][0]
        if first > 0:
            for earlier, others in rows:
                if earlier >= first:
                    break
                for start, blocks in tile:
                    _fill(grams, rows.q, start, blocks, earlier, others)
    return grams


def _fill(
    grams: dict[str, Tensor], q: int, start: int, blocks: BlocksOfBatch, earlier: int, others: BlocksOfBatch
) -> None:
    for group, gram in grams.items():
        products = blocks[group].gram(others[group])
        here = slice(q * start, q * start + products.shape[0])
        there = slice(q * earlier, q * earlier + products.shape[1])
        gram[here, there] = products
        if start != earlier:
            gram[there, here] = products.T


def cross_grams(train: GradientRows, tests: GradientRows) -> dict[str, Float[Tensor, "N K"]]:
    """Group → inner products of every gradient of one set with every one of another, in float64."""
    if train.parts is not None:
        tiles = [train.by_row(_gram_with, tile) for tile in tests.tiles()]
        return {group: torch.cat([tile[group] for tile in tiles], dim=1).to(train.device) for group in train.groups}
    q, s = train.q, tests.q
    grams = {g: torch.empty(train.n * q, tests.n * s, dtype=torch.float64, device=train.device) for g in train.groups}
    for start, blocks, test_start, test_blocks in pairs(train, tests):
        for group, gram in grams.items():
            products = blocks[group].gram(test_blocks[group])
            here = slice(q * start, q * start + products.shape[0])
            gram[here, s * test_start : s * test_start + products.shape[1]] = products
    return grams


Stretch = Sequence[tuple[int, BlocksOfBatch]]


def _gram_with(rows: GradientRows, tile: Stretch) -> dict[str, Float[Tensor, "N K"]]:
    """Group → inner products of all rows with those of a tile."""
    first = tile[0][0]
    width = sum(next(iter(blocks.values())).n for _, blocks in tile)
    grams = {g: torch.empty(rows.n * rows.q, width, dtype=torch.float64, device=rows.device) for g in tile[0][1]}
    for start, blocks in rows:
        column = 0
        for _, others in tile:
            for group, gram in grams.items():
                products = blocks[group].gram(others[group])
                here = slice(rows.q * start, rows.q * start + products.shape[0])
                gram[here, column : column + products.shape[1]] = products
            column += next(iter(others.values())).n
    assert column == width, f"the tile that begins at row {first} has {width} rows"
    return grams


def held_blocks(rows: GradientRows, groups: Sequence[str]) -> list[tuple[int, dict[str, JointBlock]]]:
    """All gradients of some groups, for others to be multiplied with."""
    if not rows.whole:
        return [(start, {group: blocks[group] for group in groups}) for start, blocks in rows]
    # Copies, for what is sent of a part of a matrix is all of it.
    return [(start, {group: _copied(blocks[group]) for group in groups}) for start, blocks in rows]


def _copied(block: JointBlock) -> JointBlock:
    return JointBlock(tuple(DenseBlock(part.dense().clone()) for part in block.blocks), block.columns)


def _gram_of_parts(rows: GradientRows, other: Stretch | None, groups: Sequence[str]) -> dict[str, Float[Tensor, "N K"]]:
    """Group → inner products of one part's rows with another's, or among themselves."""
    if other is None:
        return gram_matrices(rows, groups)
    return _gram_with(rows, [(start, {g: blocks[g] for g in groups}) for start, blocks in other])


def pairs(train: GradientRows, tests: GradientRows) -> Iterator[tuple[int, BlocksOfBatch, int, BlocksOfBatch]]:
    """Every pair of a train and a test batch, with as few passes as what fits the memory allows."""
    if train.kept:
        for test_start, test_blocks in tests:
            for start, blocks in train:
                yield start, blocks, test_start, test_blocks
        return
    for tile in tests.tiles():
        for start, blocks in train:
            for test_start, test_blocks in tile:
                yield start, blocks, test_start, test_blocks
