"""A shard: some rows of a store in one object, a zip file of a zarr 3 group, with their checksums and its own.

arrays/NAME       (rows, columns) numbers of each array, by its number
exponents/NAME    (rows,) of float16
row_checksums     (rows, 16)
attributes        format, fingerprint, first and last row, names, dtype, rounding error, sha256 of all the rest
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import zarr
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from refluence.store.places import Place
from refluence.store.rounding import restored, rounded

FORMAT = "refluence-shard-1"
SUFFIX = ".zarr.zip"
_CHECKSUMS = "row_checksums"
# Not OSError: what cannot be reached need not be damaged.
_UNREADABLE = (
    zipfile.BadZipFile,
    struct.error,
    LookupError,
    ValueError,
    TypeError,
    EOFError,
    RuntimeError,
    FileNotFoundError,
)


class DamagedError(Exception):
    """A shard that is not what was written."""


@dataclass(frozen=True)
class Label:
    """What a shard holds, without its numbers.

    Attributes:
        name: of the object.
        start: the row of the data set that its first row was.
        fingerprint: the digest of what made it.
        checksums: of its rows.
        rounding: array → (Σ (x − x̂)², Σ x²).
    """

    name: str
    start: int
    fingerprint: str
    checksums: UInt8[np.ndarray, "b 16"]
    rounding: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Shard:
    """A shard's rows, or sums over them, in the dtype of the gradients."""

    label: Label
    arrays: dict[str, Float[Tensor, "_ _"]]


def shard_name(start: int, checksums: UInt8[np.ndarray, "b 16"]) -> str:
    """Rows [start, stop) and a hash of their checksums: the same rows have the same name, whoever writes them."""
    known = hashlib.sha256(checksums.tobytes()).hexdigest()[:12]
    return f"{start:010d}-{start + len(checksums):010d}-{known}{SUFFIX}"


def write_shard(
    place: Place,
    arrays: Mapping[str, Float[Tensor, "_ _"]],
    dtype: torch.dtype,
    start: int,
    checksums: UInt8[np.ndarray, "b 16"],
    fingerprint: str,
) -> Shard:
    """Write rows, or sums over them, and give them back as they will be read.

    Raises:
        StoreError: the place is full or may not be written to.
    """
    parts = {name: rounded(rows, dtype) for name, rows in arrays.items()}
    numbers: dict[str, NDArray] = {_CHECKSUMS: checksums}
    for index, part in enumerate(parts.values()):
        numbers[f"arrays/{index}"] = part.stored
        if part.exponents is not None:
            numbers[f"exponents/{index}"] = part.exponents
    attributes = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "start": start,
        "stop": start + len(checksums),
        "arrays": list(arrays),
        "dtype": str(dtype).removeprefix("torch."),
        "rounding": [[part.squared_error, part.squared_norm] for part in parts.values()],
    }
    name = shard_name(start, checksums)
    place.write(name, _packed({**attributes, "sha256": _sum(attributes, numbers)}, numbers))
    kept = {
        key: restored(part.stored, part.exponents, rows.dtype)
        for (key, rows), part in zip(arrays.items(), parts.values(), strict=True)
    }
    return Shard(_label(name, attributes, checksums), kept)


def read_label(place: Place, name: str) -> Label:
    """What a shard says it holds; only its label is read.

    Raises:
        FileNotFoundError: it is gone.
        DamagedError: its label is not what was written.
    """
    with place.open(name) as file:
        group = _opened(file, lambda key: not key.startswith(("arrays/", "exponents/")))
        return _checked_label(name, group)


def read_shard(place: Place, name: str, dtype: torch.dtype) -> Shard:
    """A shard, compared with its checksum.

    Raises:
        FileNotFoundError: it is gone.
        DamagedError: it is not what was written.
    """
    with place.open(name) as file:
        group = _opened(io.BytesIO(file.read()), lambda _key: True)
    label = _checked_label(name, group)
    try:
        attributes = dict(group.attrs)
        names = attributes["arrays"]
        numbers: dict[str, NDArray] = {_CHECKSUMS: label.checksums}
        for kind in ("arrays", "exponents"):
            if kind in group:
                numbers |= {f"{kind}/{index}": group[kind][str(index)][...] for index in range(len(names))}
        expected = attributes.pop("sha256")
    except _UNREADABLE as error:
        raise DamagedError(str(error)) from error
    if _sum(attributes, numbers) != expected:
        raise DamagedError("its checksum differs")
    found = {
        key: restored(numbers[f"arrays/{index}"], numbers.get(f"exponents/{index}"), dtype)
        for index, key in enumerate(names)
    }
    return Shard(label, found)


def _packed(attributes: Mapping[str, Any], numbers: Mapping[str, NDArray]) -> bytes:
    objects: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(objects), attributes=dict(attributes), zarr_format=3)
    for name, array in numbers.items():
        made = group.create_array(name, shape=array.shape, chunks=array.shape, dtype=array.dtype, compressors=None)
        made[...] = array
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for key, value in sorted(objects.items()):
            # The same bytes whenever they are written: a ZipInfo of its own has a fixed date.
            file.writestr(zipfile.ZipInfo(key), value.to_bytes())
    return packed.getvalue()


def _opened(file: Any, wanted: Callable[[str], bool]) -> Any:
    make = default_buffer_prototype().buffer.from_bytes
    try:
        with zipfile.ZipFile(file) as content:
            if any(item.compress_type != zipfile.ZIP_STORED or item.flag_bits & 1 for item in content.infolist()):
                raise DamagedError("it is compressed or encrypted")
            held = {key: make(content.read(key)) for key in content.namelist() if wanted(key)}
        return zarr.open_group(MemoryStore(held), mode="r", zarr_format=3)
    except _UNREADABLE as error:
        raise DamagedError(str(error)) from error


def _checked_label(name: str, group: Any) -> Label:
    try:
        attributes = dict(group.attrs)
        if attributes["format"] != FORMAT:
            raise DamagedError(f"its format is {attributes['format']!r}, not {FORMAT!r}")
        label = _label(name, attributes, np.asarray(group[_CHECKSUMS][...]))
    except _UNREADABLE as error:
        raise DamagedError(str(error)) from error
    if label.name != shard_name(label.start, label.checksums):
        raise DamagedError("it holds other rows than its name says")
    return label


def _label(name: str, attributes: Mapping[str, Any], checksums: UInt8[np.ndarray, "b 16"]) -> Label:
    sums = zip(attributes["arrays"], attributes["rounding"], strict=True)
    rounding = {key: (float(lost), float(whole)) for key, (lost, whole) in sums}
    return Label(name, int(attributes["start"]), str(attributes["fingerprint"]), checksums, rounding)


def _sum(attributes: Mapping[str, Any], numbers: Mapping[str, NDArray]) -> str:
    digest = hashlib.sha256(json.dumps(attributes, sort_keys=True).encode())
    for name, array in sorted(numbers.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
