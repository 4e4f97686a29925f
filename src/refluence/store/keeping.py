"""How the train gradients of a fit, or their projections, are held and stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from refluence.execution import Execution
from refluence.gradients.blocks import accumulation_dtype
from refluence.gradients.rows import BlocksOfBatch, GradientRows
from refluence.sketches import Sketch
from refluence.store.checksums import row_checksums
from refluence.store.fingerprint import digest, settle, sketch_fingerprint
from refluence.store.held import Earlier, HeldRows, Make, Report
from refluence.store.memory import empty_rows
from refluence.store.places import LocalFolder, open_place
from refluence.store.sums import StoredSums, weighted_checksums

SHARD_BYTES = 16 << 20
NORMS = "norms"
FACTORS = "factors"
ROWS_OF_SUM = 4096
"""Rows of a stretch whose sums are stored: what a kill can lose; its sums take the same bytes whatever its rows."""
NO_SKETCH = "none, whole gradients"


class Keeping:
    """What `rf.Execution` asks for of the train rows.

    Args:
        execution: offload, store, store_dtype and shard_rows.
        fingerprint: of the gradients (`gradients_fingerprint`).
        curvature: what decides its rows, by name.
        by_size: whether sketches of several sizes may come, as where the accuracy decides; each has a part of its own.
        whole: whether whole gradients are held, and not only what is made of them.
        earlier: what the stretches of one data set know of the store together (`HeldRows`).

    Raises:
        StoreError: a store that cannot be opened.
    """

    def __init__(
        self,
        execution: Execution,
        fingerprint: Mapping[str, Any],
        curvature: Mapping[str, Any],
        by_size: bool,
        whole: bool = False,
        earlier: dict[str, Earlier] | None = None,
    ) -> None:
        self.execution, self.fingerprint, self.curvature = execution, fingerprint, curvature
        self.by_size, self.whole = by_size, whole
        self.earlier = {} if earlier is None else earlier
        self.place = None if execution.store is None else open_place(execution.store)
        self._known: tuple[GradientRows, UInt8[np.ndarray, "n 16"]] | None = None

    def project(
        self, rows: GradientRows, sketch: Sketch, sketches: Mapping[str, Sketch], part: str = ""
    ) -> tuple[dict[str, Float[Tensor, "n m"]], Report | None]:
        """Block → projected gradients, in the gradients' dtype and held as asked, and what the store did.

        Args:
            rows: of the training data.
            sketch: from which the `sketches` of the blocks come.
            part: of the store, for one of several sketches.

        Raises:
            StoreError: a store of another fingerprint, or one that is full or may not be written to.
        """
        out = self._empty(rows, {block: own.m for block, own in sketches.items()})

        def make(blocks: BlocksOfBatch) -> dict[str, Tensor]:
            return {block: gradients.sketch(sketches[block]) for block, gradients in blocks.items()}

        if self.place is None:
            _fill_here(out, rows, make)
            return out, None
        names = [part, f"m{sketch.m}" if self.by_size else ""]
        fingerprint = {**self.fingerprint, "sketch": sketch_fingerprint(sketch)}
        found = self._fill("/".join(filter(None, names)), fingerprint, out, rows, make, self.execution.store_dtype)
        return out, found

    def elsewhere(self, device: torch.device) -> bool:
        """Whether rows are held elsewhere than in the memory of this device."""
        return self.execution.elsewhere(device)

    def hold(self, rows: GradientRows) -> tuple[dict[str, Float[Tensor, "n d"]], Report | None]:
        """Group → gradients as rows, in their dtype and held as asked, and what the store did.

        Raises:
            StoreError: a store of another fingerprint, or one that is full or may not be written to.
        """
        out = self._empty(rows, {group: rows.dimension(group) for group in rows.groups})

        def make(blocks: BlocksOfBatch) -> dict[str, Tensor]:
            return {group: block.dense() for group, block in blocks.items()}

        if self.place is None:
            _fill_here(out, rows, make)
            return out, None
        fingerprint = {**self.fingerprint, "sketch": NO_SKETCH}
        return out, self._fill("", fingerprint, out, rows, make, self.execution.store_dtype)

    def _empty(self, rows: GradientRows, widths: Mapping[str, int]) -> dict[str, Float[Tensor, "n _"]]:
        folder = self.place.path if isinstance(self.place, LocalFolder) else None
        sizes = {group: (rows.n, width) for group, width in widths.items()}
        return empty_rows(sizes, accumulation_dtype(rows.dtype), rows.device, self.execution.offload, folder)

    def fill_norms(self, rows: GradientRows, out: dict[str, Float64[Tensor, " n"]]) -> None:
        """Fill in ‖g‖² of every row by a part of the store, where there is one."""
        columns = {block: values[:, None] for block, values in out.items()}

        def make(blocks: BlocksOfBatch) -> dict[str, Tensor]:
            return {block: gradients.squared_norms()[:, None] for block, gradients in blocks.items()}

        self._fill(NORMS, self.fingerprint, columns, rows, make, None)

    def sums(self, rows: GradientRows, weights: Float[Tensor, " n"] | None, about: Mapping[str, Any]) -> StoredSums:
        """The store of one kind of sums over the rows of the curvature.

        Args:
            rows: of the training data.
            weights: of these rows.
            about: all else that decides the sums, by name.

        Raises:
            StoreError: a store of gradients of something else.
        """
        assert self.place is not None
        fingerprint = {**self.fingerprint, "dtype of gradients": _name(rows.dtype)}
        settle(self.place.below(FACTORS), fingerprint)
        kind: dict[str, Any] = json.loads(json.dumps({**fingerprint, "curvature": self.curvature, **about}))
        place = self.place.below(f"{FACTORS}/{digest(kind)}")
        described = settle(place, kind)
        given = None if weights is None else weights.detach().double().cpu().numpy()
        known = weighted_checksums(self._checksums(rows), given)
        size = rows.batches.batch_size
        stretch = -(-(self.execution.shard_rows or ROWS_OF_SUM) // size) * size
        return StoredSums(place, digest(described), known, rows.batches.first, stretch)

    def _fill(
        self,
        part: str,
        fingerprint: Mapping[str, Any],
        out: Mapping[str, Tensor],
        rows: GradientRows,
        make: Make,
        dtype: torch.dtype | None,
    ) -> Report:
        assert self.place is not None
        values = next(iter(out.values()))
        stored = dtype or values.dtype
        place = self.place.below(part)
        dtypes = {"dtype of gradients": _name(rows.dtype), "dtype stored": _name(stored)}
        described = settle(place, {**fingerprint, **dtypes})
        width = sum(v.shape[1] for v in out.values()) * stored.itemsize
        wanted = self.execution.shard_rows or max(1, SHARD_BYTES // width)
        size = rows.batches.batch_size
        batches = -(-wanted // size) if self.execution.shard_rows else max(1, wanted // size)
        held = HeldRows(place, digest(described), stored, batches * size, rows.progress, self.earlier)
        return held.fill(out, self._checksums(rows), rows, make)

    def _checksums(self, rows: GradientRows) -> UInt8[np.ndarray, "n 16"]:
        if self._known is None or self._known[0] is not rows:
            self._known = rows, row_checksums(rows.batches, rows.progress)
        return self._known[1]


def _fill_here(out: Mapping[str, Tensor], rows: GradientRows, make: Make) -> None:
    for start, blocks in rows.made():
        for group, values in make(blocks).items():
            out[group][start : start + len(values)] = values


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
