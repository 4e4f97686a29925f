"""The IDX format of MNIST: a header of big-endian sizes, then bytes in row-major order."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

from refluence.errors import DataError

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, rows: int | None = None) -> np.ndarray:
    """The first `rows` entries (all for None) of an IDX file of unsigned bytes, gzipped or not, in the file's order.

    Raises:
        DataError: not an IDX file of bytes, or a shorter one than its header (or `rows`) says.
    """
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            zeros, kind, dimensions = struct.unpack(">HBB", file.read(4))
            if zeros != 0 or kind != _UNSIGNED_BYTE:
                raise DataError(f"{path} is not an IDX file of unsigned bytes (its type code is {kind:#04x})")
            total, *shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
            wanted = total if rows is None else rows
            if not 0 < wanted <= total:
                raise DataError(f"{path.name} holds {total:,} rows; {wanted:,} cannot be taken: ask for 1 to {total:,}")
            size = wanted * int(np.prod(shape, dtype=np.int64))
            content = file.read(size)
        except (struct.error, EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{path} cannot be read as an IDX file: {error}") from error
    if len(content) < size:
        raise DataError(f"{path} is cut short: {size:,} bytes expected after the header, {len(content):,} found")
    return np.frombuffer(content, dtype=np.uint8).reshape(wanted, *shape)
