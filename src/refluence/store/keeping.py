"""How the projected train gradients of a fit are held and stored."""

from __future__ import annotations

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
from refluence.store.held import HeldRows, Report
from refluence.store.memory import empty_rows
from refluence.store.places import LocalFolder, open_place

SHARD_BYTES = 16 << 20
NORMS = "norms"


class Keeping:
    """What `rf.Execution` asks for of the train rows.

    Args:
        execution: offload, store, store_dtype and shard_rows.
        fingerprint: of the gradients (`gradients_fingerprint`).
        by_size: whether sketches of several sizes may come, as where the accuracy decides; each has a part of its own.

    Raises:
        StoreError: a store that cannot be opened.
    """

    def __init__(self, execution: Execution, fingerprint: Mapping[str, Any], by_size: bool) -> None:
        self.execution, self.fingerprint, self.by_size = execution, fingerprint, by_size
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
        dtype = accumulation_dtype(rows.dtype)
        sizes = {block: (rows.n, own.m) for block, own in sketches.items()}
        folder = self.place.path if isinstance(self.place, LocalFolder) else None
        out = empty_rows(sizes, dtype, rows.device, self.execution.offload, folder)

        def make(blocks: BlocksOfBatch) -> dict[str, Tensor]:
            return {block: gradients.sketch(sketches[block]) for block, gradients in blocks.items()}

        if self.place is None:
            for start, blocks in rows:
                for block, values in make(blocks).items():
                    out[block][start : start + len(values)] = values
            return out, None
        names = [part, f"m{sketch.m}" if self.by_size else ""]
        fingerprint = {**self.fingerprint, "sketch": sketch_fingerprint(sketch)}
        found = self._fill("/".join(filter(None, names)), fingerprint, out, rows, make, self.execution.store_dtype)
        return out, found

    def fill_norms(self, rows: GradientRows, out: dict[str, Float64[Tensor, " n"]]) -> None:
        """Fill in ‖g‖² of every row by a part of the store, where there is one."""
        columns = {block: values[:, None] for block, values in out.items()}

        def make(blocks: BlocksOfBatch) -> dict[str, Tensor]:
            return {block: gradients.squared_norms()[:, None] for block, gradients in blocks.items()}

        self._fill(NORMS, self.fingerprint, columns, rows, make, None)

    def _fill(
        self,
        part: str,
        fingerprint: Mapping[str, Any],
        out: Mapping[str, Tensor],
        rows: GradientRows,
        make: Any,
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
        held = HeldRows(place, digest(described), stored, batches * size, rows.progress)
        return held.fill(out, self._checksums(rows), rows, make)

    def _checksums(self, rows: GradientRows) -> UInt8[np.ndarray, "n 16"]:
        if self._known is None or self._known[0] is not rows:
            self._known = rows, row_checksums(rows.batches, rows.progress)
        return self._known[1]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
