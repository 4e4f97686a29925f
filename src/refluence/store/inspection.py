"""What a store holds, whether it is whole, and what in it is of no use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from refluence.errors import StoreError
from refluence.progress import track
from refluence.store.fingerprint import MANIFEST, digest, read_manifest
from refluence.store.places import Place
from refluence.store.rounding import relative_error
from refluence.store.shards import SUFFIX, DamagedError, Label, read_label, read_shard
from refluence.store.sums import BASES, SUMS

TEMPORARY = ".part"
PARTS = re.compile(r"norms|factors|[0-9a-f]{32}|untrained|(member-|model-|m)\d+")
"""The names that parts of a store have; other folders are none of its business."""


@dataclass(frozen=True)
class Part:
    """One set of rows in a store: the store itself, one of several sketches, the squared norms, or sums over rows.

    Attributes:
        name: "" of the store itself.
        fingerprint: what its rows are of.
        rows: different rows.
        shards, size: files and bytes of them.
        oldest, newest: when shards were written, in seconds since 1970; None where there are none or it is not known.
        temporary: files that a write has not finished, or never will.
        damaged: shards whose label cannot be read.
        rounding: array → ‖X − X̂‖/‖X‖.
    """

    name: str
    fingerprint: dict[str, Any]
    rows: int
    shards: int
    size: int
    oldest: float | None
    newest: float | None
    temporary: int
    damaged: tuple[str, ...]
    rounding: dict[str, float]


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds, part by part."""

    store: str
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class Damage:
    """A file that is not what it should be, or is of no use.

    Attributes:
        name: below the store.
        why: "damaged: …", "temporary", "of another fingerprint", "its rows are in other shards", "of an older basis".
        size: bytes.
    """

    name: str
    why: str
    size: int


@dataclass
class _Looked:
    """The files of one part."""

    name: str
    place: Place
    fingerprint: dict[str, Any]
    labels: list[Label] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    temporary: list[str] = field(default_factory=list)

    def path(self, name: str) -> str:
        return f"{self.name}/{name}" if self.name else name


def describe(place: Place) -> StoreInfo:
    """What a store holds.

    Raises:
        StoreError: there is no store, or its manifest is damaged.
    """
    return StoreInfo(str(place), tuple(_part(looked) for looked in _looked(place)))


def verify(place: Place, progress: bool = True) -> list[Damage]:
    """Every shard read and compared with its checksum; those that differ.

    Raises:
        StoreError: there is no store, or its manifest is damaged.
    """
    found = []
    for looked in _looked(place):
        found += [_damage(looked, name, f"damaged: {why}") for name, why in looked.damaged.items()]
        shards = track(looked.labels, f"verifying {looked.place}", len(looked.labels), progress)
        for label in shards:
            try:
                read_shard(looked.place, label.name, torch.float64)
            except DamagedError as error:
                found.append(_damage(looked, label.name, f"damaged: {error}"))
            except FileNotFoundError:  # pruned meanwhile
                continue
    return found


def prune(place: Place, dry_run: bool = False, progress: bool = True) -> list[Damage]:
    """Remove what no fit will use, or only list it: damaged shards, shards of another fingerprint, shards whose rows
    others hold, eigenvalues in other bases than the newest, and temporary files. A writer whose temporary file is
    removed writes it again.

    Raises:
        StoreError: there is no store, its manifest is damaged, or it may not be written to.
    """
    damaged = verify(place, progress)
    names = {damage.name for damage in damaged}
    found = list(damaged)
    parts = _looked(place)
    for looked in parts:
        found += [_damage(looked, name, "temporary") for name in looked.temporary]
        own = digest(looked.fingerprint)
        strangers = [label for label in looked.labels if label.fingerprint != own]
        found += [
            _damage(looked, label.name, "of another fingerprint")
            for label in strangers
            if looked.path(label.name) not in names
        ]
        whole = [label for label in looked.labels if label.fingerprint == own and looked.path(label.name) not in names]
        if SUMS not in looked.fingerprint:
            found += [_damage(looked, label.name, "its rows are in other shards") for label in _superseded(whole)]
    named = {damage.name for damage in found}
    for looked in _older_bases(parts):
        files = [MANIFEST, *(label.name for label in looked.labels)]
        found += [_damage(looked, name, "of an older basis") for name in files if looked.path(name) not in named]
    if not dry_run:
        for looked in parts:
            for damage in found:
                folder, _, name = damage.name.rpartition("/")
                if folder == looked.name:
                    looked.place.remove(name)
    return found


def _looked(place: Place) -> list[_Looked]:
    found = []
    for name, inner in _below(place, ""):
        names = inner.names()
        if MANIFEST not in names:
            continue
        looked = _Looked(name, inner, read_manifest(inner))
        looked.temporary = [item for item in names if item.endswith(TEMPORARY)]
        for item in names:
            if item.endswith(SUFFIX):
                try:
                    looked.labels.append(read_label(inner, item))
                except DamagedError as error:
                    looked.damaged[item] = str(error)
                except FileNotFoundError:
                    continue
        found.append(looked)
    if not found:
        raise StoreError(f"{place} holds no store of gradients: it has no {MANIFEST}")
    return found


def _below(place: Place, name: str) -> Iterator[tuple[str, Place]]:
    yield name, place
    for part in place.parts():
        if not PARTS.fullmatch(part):
            continue
        yield from _below(place.below(part), f"{name}/{part}" if name else part)


def _part(looked: _Looked) -> Part:
    about = [looked.place.about(name) for name in [*(label.name for label in looked.labels), *looked.damaged]]
    times = [when for _, when in about if when is not None]
    own = digest(looked.fingerprint)
    labels = [label for label in looked.labels if label.fingerprint == own]
    rows = np.concatenate([label.checksums for label in labels]) if labels else np.empty((0, 16), dtype=np.uint8)
    sums: dict[str, list[tuple[float, float]]] = {}
    for label in labels:
        for array, pair in label.rounding.items():
            sums.setdefault(array, []).append(pair)
    return Part(
        looked.name,
        looked.fingerprint,
        len(np.unique(rows, axis=0)),
        len(about),
        sum(size for size, _ in about),
        min(times, default=None),
        max(times, default=None),
        len(looked.temporary),
        tuple(looked.damaged),
        {array: relative_error(sum(a for a, _ in pairs), sum(b for _, b in pairs)) for array, pairs in sums.items()},
    )


def _superseded(labels: list[Label]) -> list[Label]:
    """The shards, small ones first, all of whose rows are in the others that stay."""
    count: dict[bytes, int] = {}
    for label in labels:
        for row in {row.tobytes() for row in label.checksums}:
            count[row] = count.get(row, 0) + 1
    found = []
    for label in sorted(labels, key=lambda label: len(label.checksums)):
        rows = {row.tobytes() for row in label.checksums}
        if all(count[row] > 1 for row in rows):
            found.append(label)
            for row in rows:
                count[row] -= 1
    return found


def _older_bases(parts: list[_Looked]) -> list[_Looked]:
    """The eigenvalues that later ones replaced, as where rows were added: all else that decides them is the same."""
    newest: dict[str, tuple[float, _Looked]] = {}
    older = []
    for looked in parts:
        if BASES not in looked.fingerprint:
            continue
        when = _part(looked).newest
        if when is None:
            continue
        kind = digest({name: value for name, value in looked.fingerprint.items() if name != BASES})
        other = newest.get(kind)
        if other is None or other[0] < when:
            newest[kind] = when, looked
            older += [] if other is None else [other[1]]
        else:
            older.append(looked)
    return older


def _damage(looked: _Looked, name: str, why: str) -> Damage:
    return Damage(looked.path(name), why, looked.place.about(name)[0])
