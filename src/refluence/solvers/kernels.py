"""Gram matrices of per-example gradients: K = GGᵀ/n of the train rows, and GVᵀ with test rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.gradients.rows import BlocksOfBatch, GradientRows
from refluence.progress import track


def gram_matrices(rows: GradientRows) -> dict[str, Float[Tensor, "n n"]]:
    """Group → GGᵀ in float64, half of it computed and mirrored.

    Where the gradients do not fit the memory together, each stretch that fits meets the earlier rows in another pass.
    """
    grams = {g: torch.empty(rows.n, rows.n, dtype=torch.float64, device=rows.device) for g in rows.groups}
    for tile in track(rows.tiles(), "Gram matrix", enabled=rows.progress):
        for i, (start, blocks) in enumerate(tile):
            for earlier, others in tile[: i + 1]:
                _fill(grams, start, blocks, earlier, others)
        first = tile[0][0]
        if first > 0:
            for earlier, others in rows:
                if earlier >= first:
                    break
                for start, blocks in tile:
                    _fill(grams, start, blocks, earlier, others)
    return grams


def _fill(grams: dict[str, Tensor], start: int, blocks: BlocksOfBatch, earlier: int, others: BlocksOfBatch) -> None:
    for group, gram in grams.items():
        products = blocks[group].gram(others[group])
        here, there = slice(start, start + products.shape[0]), slice(earlier, earlier + products.shape[1])
        gram[here, there] = products
        if start != earlier:
            gram[there, here] = products.T


def cross_grams(train: GradientRows, tests: GradientRows) -> dict[str, Float[Tensor, "n k"]]:
    """Group → inner products of every train with every test gradient, in float64."""
    grams = {g: torch.empty(train.n, tests.n, dtype=torch.float64, device=train.device) for g in train.groups}
    for start, blocks, test_start, test_blocks in pairs(train, tests):
        for group, gram in grams.items():
            products = blocks[group].gram(test_blocks[group])
            gram[start : start + products.shape[0], test_start : test_start + products.shape[1]] = products
    return grams


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
