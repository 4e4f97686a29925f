"""Sketches with a dense P, made tile by tile and kept while they fit a stated memory."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import OrderedDict

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.sketches.base import ColumnSketch

TILE_ROWS = 256
TILE_COLUMNS = 1024
CACHE_BYTES = 2 << 30

_cache: OrderedDict[tuple, Tensor] = OrderedDict()
_cached_bytes = 0
_lock = threading.Lock()


class DenseSketch(ColumnSketch):
    """P with independent entries of variance 1/m; the first rows of a larger P, rescaled, are the smaller one's.

    P is made of tiles that depend on the seed and the tile's place alone. Tiles are kept (all sketches together) up to
    2 GiB and made again beyond, so that P is never held whole for large d.
    """

    chunk_rows = 1 << 16
    chunk_columns = TILE_COLUMNS

    @abstractmethod
    def _tile(self, row: int, column: int, device: torch.device) -> Tensor:
        """Entries of variance 1 of tile (row, column), in a compact dtype."""

    def accumulate(self, out: Float[Tensor, "n m"], columns: Float[Tensor, "n c"], start: int) -> None:
        """Add `columns` P[:, start : start + c]ᵀ to `out`."""
        stop = start + columns.shape[1]
        for column in range(start // TILE_COLUMNS, -(-stop // TILE_COLUMNS)):
            left = column * TILE_COLUMNS
            first, last = max(start, left), min(stop, left + TILE_COLUMNS)
            scaled = columns[:, first - start : last - start] * self.m**-0.5
            for row in range(-(-self.m // TILE_ROWS)):
                top = row * TILE_ROWS
                bottom = min(self.m, top + TILE_ROWS)
                tile = self._kept_tile(row, column, columns.device)[: bottom - top, first - left : last - left]
                out[:, top:bottom].addmm_(scaled, tile.to(columns.dtype).T)

    def work(self, d: int, kept: float) -> float:
        """One for each entry of P."""
        return float(d) * self.m

    def _kept_tile(self, row: int, column: int, device: torch.device) -> Tensor:
        key = (type(self), self.seed, row, column, str(device))
        if (kept := _cache.get(key)) is not None:
            return kept
        tile = self._tile(row, column, device)
        size = tile.numel() * tile.element_size()
        with _lock:
            self._keep(key, tile, size)
        return tile

    def _keep(self, key: tuple, tile: Tensor, size: int) -> None:
        global _cached_bytes
        # Oldest-first eviction would defeat the cache on a cyclic pass: what is kept stays until another sketch comes.
        if _cached_bytes + size > CACHE_BYTES:
            for other in [k for k in _cache if k[:2] != key[:2]]:
                gone = _cache.pop(other)
                _cached_bytes -= gone.numel() * gone.element_size()
        if _cached_bytes + size <= CACHE_BYTES and key not in _cache:
            _cache[key] = tile
            _cached_bytes += size
