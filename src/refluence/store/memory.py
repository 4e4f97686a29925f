"""Where rows are held: with the gradients, on the CPU, or in a mapped file."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from refluence.errors import StoreError
from refluence.execution import format_bytes


def empty_rows(
    sizes: Mapping[str, tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    offload: str,
    folder: Path | None = None,
) -> dict[str, Tensor]:
    """Block → room for rows of that size.

    Args:
        offload: as in `rf.Execution`.
        folder: of the mapped files; None: that of the system's temporary files.

    Raises:
        StoreError: no room for a mapped file.
    """
    if offload == "disk":
        return {block: mapped(size, dtype, folder) for block, size in sizes.items()}
    place = torch.device("cpu") if offload == "cpu" else device
    return {block: torch.empty(size, dtype=dtype, device=place) for block, size in sizes.items()}


def mapped(size: tuple[int, int], dtype: torch.dtype, folder: Path | None = None) -> Float[Tensor, "n m"]:
    """A tensor in a file that has no name any more, so that it is gone with the tensor or the process.

    The room is taken at once: a disk that filled up later would end the process without a word.

    Raises:
        StoreError: there is not so much room.
    """
    like = torch.empty(0, dtype=dtype).numpy()
    count = size[0] * size[1] * like.itemsize
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            _reserve(file, count)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StoreError(
                f"there is no room for {format_bytes(count)} of train gradients in {folder or tempfile.gettempdir()}: "
                'free some, set TMPDIR, or use rf.Execution(offload="none")'
            ) from error
        return torch.from_numpy(np.memmap(file, dtype=like.dtype, mode="r+", shape=size))


def _reserve(file: Any, count: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, count)
    else:  # macOS
        file.truncate(count)
