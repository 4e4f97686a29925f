"""Data, models and losses that workers of a cluster import, which fail there in many ways."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import refluence as rf

N, K, BATCH, CLASSES = 203, 5, 16, 3
VICTIM = 150
"""The row at which workers die, far into the data."""


def data(n: int = N, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Rows in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (n,), generator=generator)


TEST = data(K, seed=2)


def on_worker() -> bool:
    """Whether this is a task on a worker."""
    from distributed import get_worker

    try:
        get_worker()
    except ValueError:
        return False
    return True


class Network(nn.Module):
    """A small classifier in float64, which on a worker writes down the rows of every forward pass.

    Args:
        folder: for what it writes; a worker dies in it by SIGKILL at row `VICTIM` where the folder has a file `kill`,
            which it takes away first.
        seconds: that a forward pass on a worker takes longer.
    """

    def __init__(self, folder: Path | None = None, seconds: float = 0.0) -> None:
        super().__init__()
        self.folder, self.seconds = folder, seconds
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
        self.victim = data()[0][VICTIM].tolist()

    def forward(self, x: Tensor) -> Tensor:
        if (self.folder is not None or self.seconds) and on_worker():
            self.at_work(x)
        return self.layers(x)

    def at_work(self, x: Tensor) -> None:
        """What a forward pass on a worker does besides."""
        time.sleep(self.seconds)
        if self.folder is None:
            return
        if (x == torch.tensor(self.victim, dtype=x.dtype)).all(dim=-1).any() and taken(self.folder / "kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        note(self.folder, "forward", len(x))


def taken(file: Path) -> bool:
    """Whether this call has removed the file."""
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    return True


def note(folder: Path, what: str, count: int) -> None:
    """Add a line to what this process has written down."""
    with (folder / f"{what}-{os.getpid()}").open("a") as file:
        file.write(f"{count}\n")


def noted(folder: Path, what: str) -> dict[str, list[int]]:
    """Process → what it has written down."""
    files = sorted(folder.glob(f"{what}-*"))
    return {file.name: [int(line) for line in file.read_text().split()] for file in files}


class Load:
    """A loader that writes down who calls it.

    Args:
        folder: for what it writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> tuple[Tensor, Tensor]:
        note(self.folder, "load", N)
        return data()


class Files(Dataset):
    """Rows of a file, which is read row by row; those that are read are written down, and some cannot be."""

    def __init__(self, folder: Path, missing: tuple[int, ...] = ()) -> None:
        self.folder, self.missing = folder, missing
        for name, part in zip("xy", data(), strict=True):
            (folder / f"{name}.bin").write_bytes(part.numpy().tobytes())

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        if row in self.missing:
            raise FileNotFoundError("no file")
        note(self.folder, "read", row)
        with (self.folder / "x.bin").open("rb") as file:
            file.seek(48 * row)
            x = torch.frombuffer(bytearray(file.read(48)), dtype=torch.float64)
        with (self.folder / "y.bin").open("rb") as file:
            file.seek(8 * row)
            y = torch.frombuffer(bytearray(file.read(8)), dtype=torch.int64)[0]
        return x, y


class Hungry:
    """Cross entropy that needs so many bytes a row on workers.

    Args:
        size: bytes a row.
        limit: of the address space, beyond what the process has when it asks; None: the bytes are touched, and held
            until who watches the worker's memory has seen them.
    """

    def __init__(self, size: int, limit: int | None = None) -> None:
        self.size, self.limit = size, limit

    def __call__(self, output: Tensor, batch: Any) -> Tensor:
        if on_worker():
            self.allocate(self.size * len(output))
        return nn.functional.cross_entropy(output, batch[1], reduction="none")

    def allocate(self, size: int) -> None:
        """Take so many bytes for a moment."""
        if self.limit is None:
            held = torch.ones(size, dtype=torch.uint8)
            time.sleep(0.4 if size > 1 << 26 else 0.0)
            del held
            return
        import resource

        import psutil

        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + self.limit, before[1]))
        try:
            torch.empty(size, dtype=torch.uint8)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)


SKETCHED = rf.solvers.Sketched(rf.sketches.SJLT(32, seed=3))


def influence(
    client: Any = None, model: nn.Module | None = None, loss: Any = "cross_entropy", solver: Any = SKETCHED, **more: Any
) -> rf.Influence:
    """Influence in small batches; other names are of `rf.Influence` or `rf.Execution`."""
    names = ("store", "shard_rows", "skip_bad", "memory")
    execution = rf.Execution(cluster=client, **{name: more.pop(name) for name in names if name in more})
    options = {"damping": 0.1, "batch_size": BATCH, "progress": False, **more}
    return rf.Influence(rf.Task(model or Network(), loss=loss), solver=solver, execution=execution, **options)
