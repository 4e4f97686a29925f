"""A small classifier with a store, and what passed through its model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import refluence as rf

N, K, BATCH, SHARD = 60, 5, 4, 12


def data(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Rows of two interleaved classes and more; the same first rows for every n."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(100, 6, generator=generator)
    return x[:n], torch.randint(3, (100,), generator=generator)[:n]


class Counting(nn.Module):
    """A classifier that counts the examples it is given, and may take its time."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        time.sleep(self.seconds)
        return self.layers(x)

    def rows_seen(self, rows: Tensor) -> list[int]:
        """Which of these rows passed through since the last `forget`."""
        seen = torch.cat(self.seen) if self.seen else rows[:0]
        return [i for i, row in enumerate(rows) if bool((seen == row).all(dim=1).any())]

    def forget(self) -> None:
        """Begin to count again."""
        self.seen = []


def fitted(
    train: Any,
    store: str | Path | None = None,
    model: nn.Module | None = None,
    sketch: rf.sketches.Sketch | None = None,
    replicates: int = 1,
    weights: Tensor | None = None,
    loss: Any = "cross_entropy",
    blocks: Any = "full",
    curvature: str = "fisher",
    damping: Any = None,
    solver: Any = None,
    **execution: Any,
) -> rf.Influence:
    """Influence on `train`, sketched unless another solver is given, with small batches and shards."""
    if store is not None:
        execution = {"shard_rows": SHARD, **execution, "store": store}
    influence = rf.Influence(
        rf.Task(model or Counting(), loss=loss),
        curvature=curvature,
        solver=solver or rf.solvers.Sketched(sketch or rf.sketches.SJLT(32), replicates=replicates),
        damping=damping or rf.RelativeDamping(20.0),
        blocks=blocks,
        batch_size=BATCH,
        execution=rf.Execution(**execution),
        progress=False,
    )
    return influence.fit(train, weights=weights)


def record(influence: rf.Influence) -> Any:
    """What the store did."""
    return influence.diagnostics["store"]


def shards(store: Path) -> list[Path]:
    """The files of the store itself."""
    return sorted(store.glob("*.zarr.zip"))
