"""Sketches of the gradients themselves: one pass over the data a trial, the smaller sizes from the largest.

Rows of Gaussian and Rademacher sketches are nested: a prefix is the smaller sketch. A sparse sketch is folded to every
size that divides it; other sizes take a pass of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.gradients.rows import GradientRows
from refluence.sketches import SJLT, Gaussian, Rademacher, Sketch
from refluence.studies.projection.problem import BLOCK
from refluence.studies.projection.system import SketchedSystem

ROWS = 1024
DENSE = {"normal": Gaussian, "rademacher": Rademacher}


@dataclass(frozen=True, eq=False)
class Projected:
    """Sketches of train and test gradients.

    Args:
        proj_type: "normal", "rademacher" or "sjlt".
        train, tests: the gradients.
        offload: where PG and PV are kept: "none" on the device, "cpu" in main memory, "disk" in a mapped file.
        cache_dir: the folder of that file; None: that of the system's temporary files.
        of_train: the first so many train gradients are the tests.
    """

    proj_type: str
    train: GradientRows
    tests: GradientRows
    offload: str = "cpu"
    cache_dir: Path | None = None
    of_train: int | None = None

    def systems(self, seed: int, sizes: Sequence[int], wanted: set[int]) -> Iterator[SketchedSystem]:
        """The systems of the wanted sizes, ascending."""
        largest = max(sizes)
        left = sorted(wanted)
        if self.proj_type in DENSE:
            with self._projected(DENSE[self.proj_type](largest, seed)) as (train, tests):
                yield from self._nested(train, tests, sizes, wanted)
            return
        sketch = SJLT(largest, 1, seed)
        folded = [m for m in left if largest % m == 0]
        with self._projected(sketch) as (train, tests):
            for m in left:
                if m in folded:
                    yield self._system(m, sketch.fold(train, m), sketch.fold(tests, m))
                else:
                    with self._projected(SJLT(m, 1, seed)) as (own, own_tests):
                        yield self._system(m, own, own_tests)

    @contextmanager
    def _projected(self, sketch: Sketch) -> Iterator[tuple[Float64[Tensor, "n m"], Float64[Tensor, "k m"]]]:
        """PG and PV."""
        n = self.train.n
        k = 0 if self.of_train is not None else self.tests.n
        with TemporaryDirectory(dir=self.cache_dir, ignore_cleanup_errors=True) as folder:
            kept = self._storage(n + k, sketch.m, Path(folder) / "rows")
            for rows, first in ((self.train, 0), *(((self.tests, n),) if k else ())):
                for start, blocks in rows:
                    block = blocks[BLOCK]
                    kept[first + start : first + start + block.n] = sketch.project(block).to(kept)
            yield kept[:n], kept[: self.of_train] if self.of_train is not None else kept[n:]

    def _storage(self, rows: int, m: int, file: Path) -> Float64[Tensor, "N m"]:
        if self.offload == "disk":
            return torch.from_file(str(file), shared=True, size=rows * m, dtype=torch.float64).view(rows, m)
        device = self.train.device if self.offload == "none" else torch.device("cpu")
        return torch.empty(rows, m, dtype=torch.float64, device=device)

    def _nested(self, train: Tensor, tests: Tensor, sizes: Sequence[int], wanted: set[int]) -> Iterator[SketchedSystem]:
        """Row prefixes of a dense sketch of M rows, scaled by √(M/m)."""
        n, largest, device = len(train), train.shape[1], self.train.device
        small = [m for m in sizes if m < n]
        if wanted & set(small):
            top = max(small)
            inner = torch.zeros(top, top, dtype=torch.float64, device=device)
            for start in range(0, n, ROWS):
                some = train[start : start + ROWS, :top].to(device)
                inner.addmm_(some.T, some)
            for m in (m for m in small if m in wanted):
                scale = (largest / m) ** 0.5
                left, right = train[:, :m].to(device) * scale, tests[:, :m].to(device).T * scale
                yield SketchedSystem(m, inner[:m, :m] * (scale**2 / n), left, right)
        kernel = torch.zeros(n, n, dtype=torch.float64, device=device)
        across = torch.zeros(n, len(tests), dtype=torch.float64, device=device)
        done = 0
        for m in (m for m in sizes if n <= m <= max(wanted)):
            for start in range(done, m, ROWS):
                columns = slice(start, min(start + ROWS, m))
                some = train[:, columns].to(device)
                kernel.addmm_(some, some.T)
                across.addmm_(some, tests[:, columns].to(device).T)
            done = m
            if m in wanted:
                yield SketchedSystem(m, kernel * (largest / (m * n)), None, across * (largest / m), dual=True)

    def _system(self, m: int, train: Float64[Tensor, "n m"], tests: Float64[Tensor, "k m"]) -> SketchedSystem:
        n, device = len(train), self.train.device
        train, tests = train.to(device), tests.to(device)
        if m < n:
            return SketchedSystem(m, train.T @ train / n, train, tests.T)
        return SketchedSystem(m, train @ train.T / n, None, train @ tests.T, dual=True)
