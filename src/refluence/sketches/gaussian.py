"""Gaussian sketches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refluence.sketches.dense import TILE_COLUMNS, TILE_ROWS, DenseSketch
from refluence.sketches.random_bits import mix


@dataclass(frozen=True)
class Gaussian(DenseSketch):
    """P with entries N(0, 1/m).

    Args:
        m: sketch size.
        seed: which P.
    """

    m: int
    seed: int = 0

    def _tile(self, row: int, column: int, device: torch.device) -> Tensor:
        # Drawn on the CPU whatever the device, so that P is the same on all.
        key = mix(mix(torch.tensor(self.seed, dtype=torch.int64)) + (row << 32) + column)
        generator = torch.Generator().manual_seed(int(key) & ((1 << 63) - 1))
        return torch.randn(TILE_ROWS, TILE_COLUMNS, generator=generator, dtype=torch.float32).to(device)
