"""Sums over stretches of rows, stored so that each stretch is summed once."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from refluence.store.checksums import CHECKSUM_BYTES
from refluence.store.held import Report
from refluence.store.places import Place
from refluence.store.shards import DamagedError, read_shard, shard_name, write_shard

SUMS, BASES = "sums", "bases"
"""Names in the fingerprint of sums: their kind, and a digest of the eigenvectors that they are taken in."""
Sums = dict[str, Tensor]
"""Name → sums as matrices in float64."""


class StoredSums:
    """The sums of one kind over the stretches of a data set.

    Args:
        place: of their shards, one for each stretch.
        fingerprint: the digest that these carry.
        checksums: of all that decides what a row adds to the sums, for each row.
        first: place of the first of the rows in the whole data set.
        size: rows of a stretch.
    """

    def __init__(
        self, place: Place, fingerprint: str, checksums: UInt8[np.ndarray, "n 16"], first: int, size: int
    ) -> None:
        self.place, self.fingerprint, self.checksums = place, fingerprint, checksums
        self.first, self.size = first, size
        self.report = Report(str(place), "float64")

    def each(self, make: Callable[[int, int], Sums]) -> Iterator[Sums]:
        """The sums over each stretch [start, stop) in the order of the rows, read or made and stored.

        A stretch is known by its place in the data, which labels of "mc_fisher" are drawn by, and its checksums.

        Raises:
            StoreError: the store is full or may not be written to.
        """
        names = set(self.place.names())
        for start in range(0, len(self.checksums), self.size):
            stop = min(start + self.size, len(self.checksums))
            name = shard_name(self.first + start, self.checksums[start:stop])
            found = self._read(name) if name in names else None
            if found is None:
                found = make(start, stop)
                own = self.checksums[start:stop]
                write_shard(self.place, found, torch.float64, self.first + start, own, self.fingerprint)
                self.report.made += stop - start
            else:
                self.report.read += stop - start
            yield found

    def _read(self, name: str) -> Sums | None:
        try:
            shard = read_shard(self.place, name, torch.float64)
        except FileNotFoundError:  # pruned since it was listed
            return None
        except DamagedError as error:
            warnings.warn(
                f"{name} of the store {self.place} is damaged ({error}): its rows are summed again", stacklevel=2
            )
            self.report.damaged.append(name)
            self.place.remove(name)
            return None
        return shard.arrays if shard.label.fingerprint == self.fingerprint else None


def weighted_checksums(
    checksums: UInt8[np.ndarray, "n 16"], weights: Float64[np.ndarray, " n"] | None
) -> UInt8[np.ndarray, "n 16"]:
    """Checksums of the rows with their weights."""
    if weights is None:
        return checksums
    found = np.empty_like(checksums)
    for row, own in enumerate(checksums):
        digest = hashlib.blake2b(own.tobytes() + float(weights[row]).hex().encode(), digest_size=CHECKSUM_BYTES)
        found[row] = np.frombuffer(digest.digest(), dtype=np.uint8)
    return found
