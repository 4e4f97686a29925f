"""Rademacher (random sign) sketches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refluence.sketches.dense import TILE_COLUMNS, TILE_ROWS, DenseSketch
from refluence.sketches.random_bits import random_bits

BITS = 64


@dataclass(frozen=True)
class Rademacher(DenseSketch):
    """P with entries ±1/√m, each sign with probability one half.

    Args:
        m: sketch size.
        seed: which P.
    """

    m: int
    seed: int = 0

    def _tile(self, row: int, column: int, device: torch.device) -> Tensor:
        words = TILE_ROWS * TILE_COLUMNS // BITS
        bits = random_bits(self.seed, (row << 32) + column, 0, words, device)
        signs = (bits[:, None] >> torch.arange(BITS, device=device)) & 1
        return (1 - 2 * signs).to(torch.int8).reshape(TILE_ROWS, TILE_COLUMNS)
