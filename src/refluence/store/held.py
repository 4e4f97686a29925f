"""Rows by their place in a data set, taken from shards wherever they lie in them, or made."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from refluence.gradients.rows import BlocksOfBatch, GradientRows
from refluence.progress import track
from refluence.store.places import Place
from refluence.store.rounding import relative_error
from refluence.store.shards import SUFFIX, DamagedError, Label, read_label, read_shard, write_shard

Make = Callable[[BlocksOfBatch], dict[str, Tensor]]


@dataclass
class Report:
    """What a store gave and took.

    Attributes:
        store: where it is.
        dtype: of the stored rows.
        rows: how many there are, `read` of them from the store and `made` from the model.
        damaged: shards whose rows were made again.
        rounding: array → (Σ (x − x̂)², Σ x²) over the shards.
    """

    store: str
    dtype: str
    read: int = 0
    made: int = 0
    damaged: list[str] = field(default_factory=list)
    rounding: dict[str, tuple[float, float]] = field(default_factory=dict)

    def count(self, label: Label) -> None:
        """Count the rounding of one more shard."""
        for name, (lost, whole) in label.rounding.items():
            before = self.rounding.get(name, (0.0, 0.0))
            self.rounding[name] = (before[0] + lost, before[1] + whole)

    def add(self, other: Report) -> Report:
        """That of more rows of the same store."""
        rounding = dict(self.rounding)
        for name, (lost, whole) in other.rounding.items():
            before = rounding.get(name, (0.0, 0.0))
            rounding[name] = (before[0] + lost, before[1] + whole)
        read, made = self.read + other.read, self.made + other.made
        return Report(self.store, self.dtype, read, made, self.damaged + other.damaged, rounding)

    def record(self) -> dict[str, Any]:
        """For diagnostics, JSON-able; the rounding error is ‖X − X̂‖/‖X‖ of each block."""
        return {
            "store": self.store,
            "dtype": self.dtype,
            "rows_read": self.read,
            "rows_made": self.made,
            "damaged": list(self.damaged),
            "rounding_error": {name: relative_error(*sums) for name, sums in self.rounding.items()},
        }


@dataclass
class Earlier:
    """The shards that were in a part of a store when this process first looked, and their labels once they are read."""

    names: frozenset[str]
    labels: list[Label] | None = None


class HeldRows:
    """The rows of one part of a store.

    Args:
        place: of its shards.
        fingerprint: the digest that its shards carry; others are no part of it.
        dtype: that they are stored in.
        shard_rows: rows of a shard, a multiple of the batches.
        progress: whether reading shows a bar.
        earlier: what several stretches of one data set, filled by one process, know of the place together.
    """

    def __init__(
        self,
        place: Place,
        fingerprint: str,
        dtype: torch.dtype,
        shard_rows: int,
        progress: bool,
        earlier: dict[str, Earlier] | None = None,
    ) -> None:
        self.place, self.fingerprint, self.dtype = place, fingerprint, dtype
        self.earlier = {} if earlier is None else earlier
        self.shard_rows, self.progress = shard_rows, progress
        self.report = Report(str(place), str(dtype).removeprefix("torch."))
        self.first = 0

    def fill(
        self,
        out: Mapping[str, Float[Tensor, "n _"]],
        checksums: UInt8[np.ndarray, "n 16"],
        gradients: GradientRows,
        make: Make,
    ) -> Report:
        """Fill `out` with the rows that have these checksums: read where the store has them, else made and stored.

        Rows are made in the batches of a fit without a store. Whatever ends the pass, what was made is stored.

        Raises:
            StoreError: the store is full or may not be written to.
        """
        self.first = gradients.batches.first
        labels, shard, position = self._found(checksums, gradients.batches.n < gradients.batches.whole)
        missing = self._read(out, labels, shard, position)
        pending = segments(missing, self.shard_rows)
        self.report.read, self.report.made = int((~missing).sum()), int(missing.sum())
        reached = 0
        try:
            for start, blocks in gradients.over(pending) if pending else ():
                made = make(blocks)
                count = next(iter(made.values())).shape[0]
                wanted = torch.from_numpy(missing[start : start + count].nonzero()[0])
                for name, rows in made.items():
                    out[name][start + wanted] = rows[wanted.to(rows.device)].to(out[name])
                reached = start + count
                while pending and pending[0][1] <= reached:
                    self._write(out, checksums, *pending.pop(0))
        except BaseException:
            self._save_begun(out, checksums, pending, reached)
            raise
        return self.report

    def _found(
        self, checksums: UInt8[np.ndarray, "n 16"], stretch: bool
    ) -> tuple[list[Label], Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """The labels, and where each row lies in their shards.

        The rows of a stretch are looked for in shards of the same rows first. Those of other rows that appear while
        other stretches are made hold no row of this one, and to read them all each time would take their square.
        """
        names = [name for name in self.place.names() if name.endswith(SUFFIX)]
        if not stretch:
            labels = self.labels(names)
            return labels, *located(checksums, labels, self.first)
        earlier = self.earlier.setdefault(str(self.place), Earlier(frozenset(names)))
        last = self.first + len(checksums)
        labels = self.labels([name for name in names if overlaps(name, self.first, last)])
        shard, position = located(checksums, labels, self.first)
        if (shard >= 0).all() or not earlier.names:
            return labels, shard, position
        if earlier.labels is None:
            earlier.labels = self.labels(sorted(earlier.names))
        labels = [*labels, *(label for label in earlier.labels if not overlaps(label.name, self.first, last))]
        return labels, *located(checksums, labels, self.first)

    def labels(self, names: Sequence[str]) -> list[Label]:
        """Of those of the shards that belong here, the first rows first; damaged ones are named and put away."""
        found = []
        for name in track(names, "shards", len(names), self.progress):
            try:
                label = read_label(self.place, name)
            except FileNotFoundError:  # pruned since it was listed
                continue
            except DamagedError as error:
                self._put_away(name, error)
                continue
            if label.fingerprint == self.fingerprint:
                found.append(label)
        return sorted(found, key=lambda label: label.start)

    def _read(
        self,
        out: Mapping[str, Tensor],
        labels: Sequence[Label],
        shard: Int64[np.ndarray, " n"],
        position: Int64[np.ndarray, " n"],
    ) -> Bool[np.ndarray, " n"]:
        """Fill in what the shards hold; True for the rows that none has."""
        dtype = next(iter(out.values())).dtype
        used = np.unique(shard[shard >= 0])
        for index in track(used, f"reading {self.place}", len(used), self.progress):
            rows = (shard == index).nonzero()[0]
            try:
                found = read_shard(self.place, labels[index].name, dtype)
            except FileNotFoundError:
                shard[rows] = -1
                continue
            except DamagedError as error:
                self._put_away(labels[index].name, error)
                shard[rows] = -1
                continue
            _copy(out, found.arrays, rows, position[rows])
            self.report.count(found.label)
        return shard < 0

    def _write(self, out: Mapping[str, Tensor], checksums: UInt8[np.ndarray, "n 16"], start: int, stop: int) -> None:
        rows = {name: values[start:stop] for name, values in out.items()}
        at = self.first + start
        shard = write_shard(self.place, rows, self.dtype, at, checksums[start:stop], self.fingerprint)
        self.report.count(shard.label)
        for name, kept in shard.arrays.items():
            out[name][start:stop] = kept.to(out[name].device)

    def _save_begun(
        self, out: Mapping[str, Tensor], checksums: UInt8[np.ndarray, "n 16"], pending: list, reached: int
    ) -> None:
        """Store the rows of a shard that a bad example or an interrupt left unfinished."""
        if pending and pending[0][0] < reached < pending[0][1]:
            self._write(out, checksums, pending[0][0], reached)

    def _put_away(self, name: str, error: Exception) -> None:
        warnings.warn(f"{name} of the store {self.place} is damaged ({error}): its rows are made again", stacklevel=2)
        self.report.damaged.append(name)
        self.place.remove(name)


def located(
    checksums: UInt8[np.ndarray, "n 16"], labels: Sequence[Label], first: int = 0
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """(shard, row in it) of each row from `first` on, −1 where no shard has it: one of the same stretch before others.

    Any row with the same checksum is as good, so that rows may be added, left out or moved.
    """
    n = len(checksums)
    shard, position = np.full(n, -1, dtype=np.int64), np.zeros(n, dtype=np.int64)
    for index, label in enumerate(labels):
        stretch = slice(label.start - first, label.start - first + len(label.checksums))
        if stretch.start >= 0 and stretch.stop <= n and np.array_equal(checksums[stretch], label.checksums):
            shard[stretch], position[stretch] = index, np.arange(len(label.checksums))
    left = (shard < 0).nonzero()[0]
    if len(left) and labels:
        known = np.concatenate([label.checksums for label in labels]).view("S16")[:, 0]
        owner = np.concatenate([np.full(len(label.checksums), i) for i, label in enumerate(labels)])
        within = np.concatenate([np.arange(len(label.checksums)) for label in labels])
        order = np.argsort(known, kind="stable")
        wanted = np.ascontiguousarray(checksums[left]).view("S16")[:, 0]
        at = np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)
        same = known[order[at]] == wanted
        shard[left[same]], position[left[same]] = owner[order[at[same]]], within[order[at[same]]]
    return shard, position


def overlaps(name: str, first: int, stop: int) -> bool:
    """Whether a shard, by its name, may have rows of the stretch [first, stop)."""
    try:
        start, end = (int(number) for number in name.split("-")[:2])
    except ValueError:
        return True
    return start < stop and end > first


def segments(missing: Bool[np.ndarray, " n"], size: int) -> list[tuple[int, int]]:
    """The stretches of missing rows, cut at the multiples of `size`."""
    rows = missing.nonzero()[0]
    breaks = np.flatnonzero((np.diff(rows) > 1) | (rows[1:] % size == 0)) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(rows, breaks) if len(part)]


def _copy(
    out: Mapping[str, Tensor],
    arrays: Mapping[str, Tensor],
    rows: Int64[np.ndarray, " r"],
    position: Int64[np.ndarray, " r"],
) -> None:
    for name, values in arrays.items():
        out[name][torch.from_numpy(rows)] = values[torch.from_numpy(position)].to(out[name].device)
