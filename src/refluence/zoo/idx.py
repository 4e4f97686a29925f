"""The IDX format of MNIST: a header of big-endian sizes, then bytes in row-major order."""

from __future__ import annotations

import struct

import numpy as np

from refluence.errors import DataError

_UNSIGNED_BYTE = 0x08


def read_idx(content: bytes, rows: int | None, name: str) -> np.ndarray:
    """The first `rows` entries (all for None) of an IDX file of unsigned bytes, in the file's order; read-only.

    Raises:
        DataError: not an IDX file of bytes, or a shorter one than its header (or `rows`) says; calls it `name`.
    """
    try:
        zeros, kind, dimensions = struct.unpack_from(">HBB", content)
        total, *shape = struct.unpack_from(f">{dimensions}I", content, 4)
    except struct.error as error:
        raise DataError(f"{name} cannot be read as an IDX file: {error}") from error
    if zeros != 0 or kind != _UNSIGNED_BYTE:
        raise DataError(f"{name} is not an IDX file of unsigned bytes (its type code is {kind:#04x})")
    wanted = total if rows is None else rows
    if not 0 < wanted <= total:
        raise DataError(f"{name} holds {total:,} rows; {wanted:,} cannot be taken: ask for 1 to {total:,}")
    begin = 4 + 4 * dimensions
    size = wanted * int(np.prod(shape, dtype=np.int64))
    if len(content) < begin + size:
        raise DataError(
            f"{name} is cut short: {size:,} bytes expected after the header, {len(content) - begin:,} found"
        )
    return np.frombuffer(content, np.uint8, size, begin).reshape(wanted, *shape)
