"""What a run may use."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil
import torch

from refluence.errors import PlanError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SHARE_OF_FREE_MEMORY = 0.8


@dataclass(frozen=True)
class Execution:
    """What a run may use.

    Args:
        memory: bytes, or a text such as "8GB"; None: 80 % of what is free on the device.

    Raises:
        PlanError: a memory that is no positive size.
    """

    memory: int | str | None = None

    def __post_init__(self) -> None:
        if self.memory is not None and parse_bytes(self.memory) <= 0:
            raise PlanError(f"memory must be positive, not {self.memory!r}")

    def budget(self, device: torch.device) -> int:
        """Bytes that may be used on a device."""
        if self.memory is not None:
            return parse_bytes(self.memory)
        if device.type == "cuda":
            return int(SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0])
        return int(SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available)


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
