"""Sparse Johnson–Lindenstrauss sketches (CountSketch for one nonzero a column)."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from refluence.errors import RefluenceError
from refluence.sketches.base import ColumnSketch
from refluence.sketches.random_bits import non_negative, random_bits

CACHE_BYTES = 1 << 30
DOUBLED_ROWS = 128

_plans: OrderedDict[tuple, tuple[Tensor, ...]] = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True)
class SJLT(ColumnSketch):
    """P with `nonzeros` entries ±1/√nonzeros in each column, one in each of `nonzeros` bands of m/nonzeros rows.

    A column's row in a band is a hash of its index modulo the band's height, so the sketch of a smaller m that divides
    m follows by folding: PG_small = Σ over the bands' aliases of PG (Kane & Nelson, 2014).

    Args:
        m: sketch size, a multiple of `nonzeros`.
        nonzeros: entries a column.
        seed: which P.
    """

    m: int
    nonzeros: int = 1
    seed: int = 0

    chunk_rows = 64
    chunk_columns = 1 << 17

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.nonzeros, int) or self.nonzeros < 1 or self.m % self.nonzeros:
            raise RefluenceError(
                f"m = {self.m} must be a multiple of nonzeros = {self.nonzeros!r}, which is at least 1"
            )

    def accumulate(self, out: Float[Tensor, "n m"], columns: Float[Tensor, "n c"], start: int) -> None:
        """Add `columns` P[:, start : start + c]ᵀ to `out`."""
        bags = columns.stride(0) == 1 and columns.dtype in (torch.float32, torch.float64) and columns.shape[0] > 1
        if bags and columns.device.type == "cpu":
            index, signs, offsets = self._sorted(start, columns.shape[1], columns.dtype, columns.device)
            sums = F.embedding_bag(index, columns.T, offsets, mode="sum", per_sample_weights=signs)
            out += sums.T
            return
        for rows, signs in zip(*self._hashed(start, columns.shape[1], columns.device), strict=True):
            out.scatter_add_(1, rows.expand_as(columns), columns * (signs.to(columns.dtype) * self.nonzeros**-0.5))

    def work(self, d: int, kept: float) -> float:
        """A few for each nonzero: an addition to a hashed place takes several times as long as one of a product."""
        return 4.0 * d * self.nonzeros

    def _add_plain_rows(self, out: Float[Tensor, "n m"], rows: Float[Tensor, "n d"]) -> None:
        """Dense rows in one pass: negative entries go to m further columns, which spares a signed copy of the rows."""
        places, signs = self._hashed(0, rows.shape[1], rows.device)
        places = places + self.m * (signs < 0)
        doubled = torch.empty(DOUBLED_ROWS, 2 * self.m, dtype=out.dtype, device=out.device)
        for first in range(0, rows.shape[0], DOUBLED_ROWS):
            some = rows[first : first + DOUBLED_ROWS]
            sums = doubled[: some.shape[0]].zero_()
            for place in places:
                sums.scatter_add_(1, place.expand_as(some), some)
            out[first : first + DOUBLED_ROWS] += (sums[:, : self.m] - sums[:, self.m :]) * self.nonzeros**-0.5

    def fold(self, projected: Float[Tensor, "n m"], m: int) -> Float[Tensor, "n k"]:
        """The projection by the sketch of the same seed of a smaller size `m`, from the projection by this one.

        Raises:
            RefluenceError: `m` does not divide this sketch's size, or is no multiple of `nonzeros`.
        """
        smaller = SJLT(m, self.nonzeros, self.seed)
        if self.m % m:
            raise RefluenceError(f"a sketch of {self.m} rows folds to sizes that divide it, not to {m}")
        bands = projected.unflatten(1, (self.nonzeros, self.m // m, smaller.m // self.nonzeros))
        return bands.sum(dim=2).flatten(1)

    def _hashed(
        self, start: int, count: int, device: torch.device
    ) -> tuple[Int64[Tensor, "s c"], Int64[Tensor, "s c"]]:
        """Row and sign of every nonzero of columns [start, start + count)."""
        key = (self.m, self.nonzeros, self.seed, start, count, str(device))
        if (kept := _plans.get(key)) is None:
            height = self.m // self.nonzeros
            bits = torch.stack([random_bits(self.seed, band, start, count, device) for band in range(self.nonzeros)])
            band = torch.arange(self.nonzeros, device=device)[:, None] * height
            _keep(key, kept := (non_negative(bits) % height + band, 1 - 2 * (bits < 0).to(torch.int64)))
        rows, signs = kept
        return rows, signs

    def _sorted(
        self, start: int, count: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Int64[Tensor, " sc"], Float[Tensor, " sc"], Int64[Tensor, " m"]]:
        """The columns of each row of P in turn, their entries, and where each row's begin."""
        key = (self.m, self.nonzeros, self.seed, start, count, str(device), dtype)
        if (kept := _plans.get(key)) is None:
            rows, signs = self._hashed(start, count, device)
            order = torch.argsort(rows.flatten(), stable=True)
            counts = torch.bincount(rows.flatten(), minlength=self.m)
            entries = signs.flatten()[order].to(dtype) * self.nonzeros**-0.5
            _keep(key, kept := (order % count, entries, counts.cumsum(0) - counts))
        index, entries, offsets = kept
        return index, entries, offsets


def _keep(key: tuple, tensors: tuple[Tensor, ...]) -> None:
    """Keep hashed columns for the next batch, the oldest making room."""
    with _lock:
        _plans[key] = tensors
        while len(_plans) > 1 and sum(t.nbytes for kept in _plans.values() for t in kept) > CACHE_BYTES:
            _plans.popitem(last=False)
