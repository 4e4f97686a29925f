"""What a run may use."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from refluence.errors import PlanError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SHARE_OF_FREE_MEMORY = 0.8
OFFLOADS = ("none", "cpu", "disk")
STORE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Execution:
    """What a run may use.

    `offload`, `store` and what belongs to it are about the train gradients: projected ones of solver Sketched, whole
    ones of others. Of `Kfac` and `Ekfac` the store keeps the sums of their factors, and nothing is offloaded.

    Args:
        memory: bytes, or a text such as "8GB"; None: 80 % of what is free on the device.
        offload: where they are held: "none": where they are made; "cpu": in the CPU's memory, from which a GPU takes
            them block by block (on a CPU that is where they are); "disk": in a temporary file that is mapped into
            memory and removed with the fit.
        store: a path, or a URL that fsspec knows, of a folder in which they are stored as they are made, so that a
            killed fit goes on from there and a later fit makes only what is missing; None: they are not stored.
        store_dtype: torch.float16, bfloat16 or float32; None: that of the gradients, without rounding.
        shard_rows: rows of one file of the store, rounded up to whole batches, and of what a worker of a cluster does
            in one task; None: about 16 MB, and some tasks a worker.
        cluster: a `dask.distributed.Client`, the address of a scheduler, or "local" for a worker on every core: the
            train side is then made, held and scored on the workers; None: here, or in the processes of the
            torch.distributed group that this one belongs to. `memory` is then that of each worker.
        skip_bad: whether a fit leaves out, with weight 0, the train examples that cannot be read, on which the model or
            the loss raises, or whose loss or gradient is NaN or Inf, instead of stopping at the first.

    Raises:
        PlanError: a memory that is no positive size, another word for offload, options of a store without one.
    """

    memory: int | str | None = None
    offload: str = "none"
    store: str | os.PathLike[str] | None = None
    store_dtype: torch.dtype | None = None
    shard_rows: int | None = None
    skip_bad: bool = False
    cluster: Any = None

    def __post_init__(self) -> None:
        if self.memory is not None and parse_bytes(self.memory) <= 0:
            raise PlanError(f"memory must be positive, not {self.memory!r}")
        if self.offload not in OFFLOADS:
            raise PlanError(f'offload must be "none", "cpu" or "disk", not {self.offload!r}')
        if self.store_dtype is not None and self.store_dtype not in STORE_DTYPES:
            raise PlanError(
                f"store_dtype must be torch.float16, bfloat16 or float32, or None for the gradients' own, not "
                f"{self.store_dtype!r}"
            )
        rows = self.shard_rows
        if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
            raise PlanError(f"shard_rows must be an integer of at least 1, not {rows!r}")
        if self.store is None and (self.store_dtype is not None or (rows is not None and self.cluster is None)):
            raise PlanError("store_dtype and shard_rows are of a store: give store=PATH too")
        if self.cluster is not None and not isinstance(self.cluster, str) and not hasattr(self.cluster, "submit"):
            raise PlanError(
                'cluster must be a dask.distributed Client, the address of a scheduler or "local", not '
                f"{self.cluster!r}"
            )

    @property
    def keeps(self) -> bool:
        """Whether more is asked for than to hold rows where they are made."""
        return self.store is not None or self.offload != "none"

    def elsewhere(self, device: torch.device) -> bool:
        """Whether rows are held elsewhere than in the memory of the device that makes them."""
        return self.offload == "disk" or (self.offload == "cpu" and device.type != "cpu")

    def below(self, part: str) -> Execution:
        """The same with a store of its own inside the store, where there is one."""
        return self if self.store is None else replace(self, store=f"{os.fspath(self.store).rstrip('/')}/{part}")

    def budget(self, device: torch.device) -> int:
        """Bytes that may be used on a device."""
        if self.memory is not None:
            return parse_bytes(self.memory)
        if device.type == "cuda":
            return int(SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0])
        return int(SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available)


def usable_device(name: str | torch.device) -> torch.device:
    """The device of this name.

    Raises:
        PlanError: a device that is not here, or no name of one.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PlanError(f"device {str(name)!r} cannot be used here: {reason}") from error
    return device


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of a memory that is too small, which PyTorch's CPU allocator says by words only."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    wanting = "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text
    return isinstance(error, RuntimeError) and wanting


def parse_bytes(memory: int | str) -> int:
    """A number of bytes from a number or a text such as "8GB" or "512 MiB".

    Raises:
        PlanError: another text.
    """
    if isinstance(memory, int):
        return memory
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?I?B?)\s*", str(memory).upper())
    if match is None or match[2] not in UNITS:
        raise PlanError(f'memory must be a number of bytes or a text such as "8GB", not {memory!r}')
    return int(float(match[1]) * UNITS[match[2]])


def format_bytes(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
