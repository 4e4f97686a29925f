"""A checksum of every row of a data set, by which a store knows its rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor, uint8

from refluence.batches import Batch, Batches, rows_of, tensors_of
from refluence.progress import track

CHECKSUM_BYTES = 16


def row_checksums(batches: Batches, progress: bool = True) -> UInt8[np.ndarray, "n 16"]:
    """A checksum of each row as it is read: of the dtypes, shapes and bytes of its tensors, and of their names.

    What is no tensor of a batch counts for each of its rows. So does the length to which a loader pads them.
    """
    found = np.empty((batches.n, CHECKSUM_BYTES), dtype=np.uint8)
    start = 0
    for batch in track(batches.raw(), f"checksums of {batches.name}", len(batches), progress):
        sums = batch_checksums(batch)
        found[start : start + len(sums)] = sums
        start += len(sums)
    return found


def batch_checksums(batch: Batch) -> UInt8[np.ndarray, "b 16"]:
    """The checksums of the rows of a batch."""
    count, tensors = rows_of(batch), tensors_of(batch)
    columns = [_bytes(tensor, count) for tensor in tensors]
    kinds = [(str(tensor.dtype), tuple(tensor.shape[1:])) for tensor in tensors]
    head = repr((kinds, _others(batch))).encode()
    found = np.empty((count, CHECKSUM_BYTES), dtype=np.uint8)
    for row in range(count):
        digest = hashlib.blake2b(head, digest_size=CHECKSUM_BYTES)
        for column in columns:
            digest.update(column[row])
        found[row] = np.frombuffer(digest.digest(), dtype=np.uint8)
    return found


def _bytes(tensor: Tensor, count: int) -> UInt8[np.ndarray, "b s"]:
    rows = tensor.detach().cpu().reshape(count, math.prod(tensor.shape[1:])).contiguous()
    return rows.view(uint8).numpy() if rows.numel() else np.empty((count, 0), dtype=np.uint8)


def _others(batch: Batch) -> list[Any]:
    """What is no tensor in a batch, and the names of its entries."""
    if isinstance(batch, Tensor):
        return []
    if isinstance(batch, Mapping):
        return [item for key, value in batch.items() for item in (key, *_others(value))]
    if isinstance(batch, (tuple, list)):
        return [item for value in batch for item in _others(value)]
    return [batch]
