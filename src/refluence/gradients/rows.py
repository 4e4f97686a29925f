"""The per-example gradients of a whole data set, as blocks batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from refluence.batches import Batches
from refluence.gradients.capture import Capture
from refluence.gradients.functional import Objective
from refluence.gradients.joint import JointBlock
from refluence.gradients.matrices import LayerMatrix
from refluence.gradients.parts import Parts, Pass, Tree
from refluence.progress import track

if TYPE_CHECKING:
    from refluence.store.keeping import Keeping

BlocksOfBatch = dict[str, JointBlock]


class GradientRows:
    """Gradients of a data set: kept in memory after the first pass where they fit, else made again at each pass.

    Args:
        capture: makes the gradients.
        batches: the data set.
        objective: what is differentiated: `capture.loss` or `capture.measurement`.
        memory: bytes that may be kept.
        progress: whether passes show a bar.
        q: values of the objective, and so gradients, for each example.
        keeping: how what is made of these gradients is kept and stored; None: in memory.
    """

    def __init__(
        self,
        capture: Capture,
        batches: Batches,
        objective: Objective,
        memory: int,
        progress: bool = True,
        q: int = 1,
        keeping: Keeping | None = None,
    ) -> None:
        self.q, self.keeping = q, keeping
        self.capture, self.batches, self.objective = capture, batches, objective
        self.memory, self.progress = memory, progress
        self.n = batches.n
        self.groups = tuple(capture.groups)
        self.parts: Parts | None = None
        self.role = ""
        self._kept: list[tuple[int, BlocksOfBatch]] | None = None
        self._fits = True
        self.passed = False
        self._norms: dict[str, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the gradients are made."""
        return next(iter(self.capture.parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the gradients."""
        return reduce(torch.promote_types, (p.dtype for p in self.capture.parameters.values()))

    def dimension(self, group: str) -> int:
        """d of a group."""
        return sum(self.capture.shapes[name].numel() for name in self.capture.groups[group])

    def matrices(self, group: str) -> tuple[LayerMatrix, ...]:
        """The layers of a group as matrices."""
        return self.capture.matrices(group)

    def total(self, function: Pass, *given: Any) -> Tree:
        """The sum of a pass over the rows (`Parts`), wherever they are."""
        return function(self, *given) if self.parts is None else self.parts.total(self.role, function, *given)

    def by_row(self, function: Pass, *given: Any) -> Tree:
        """What a pass gives for each row (`Parts`), wherever they are."""
        return function(self, *given) if self.parts is None else self.parts.by_row(self.role, function, *given)

    @property
    def kept(self) -> bool:
        """Whether further passes cost nothing."""
        return self._kept is not None

    def __iter__(self) -> Iterator[tuple[int, BlocksOfBatch]]:
        """(first row, group → gradients) for each batch."""
        if self._kept is not None:
            yield from self._kept
            return
        keeping: list[tuple[int, BlocksOfBatch]] | None = [] if self._fits else None
        used = 0
        passes = track(
            self.capture.gradients(self.batches, self.objective, self.q),
            f"gradients of {self.batches.name}",
            len(self.batches),
            self.progress,
        )
        for start, blocks in passes:
            if keeping is not None:
                used += sum(block.nbytes for block in blocks.values())
                keeping.append((start, blocks))
                if used > self.memory:
                    keeping, self._fits = None, False
            yield start, blocks
        self._kept, self.passed = keeping, True

    def over(self, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, BlocksOfBatch]]:
        """The batches that hold rows of any of the ranges [start, stop); other rows are not made."""
        batches = self.batches.holding(ranges)
        if len(batches) == len(self.batches):
            yield from self
        elif self._kept is not None:
            size = self.batches.batch_size
            yield from (item for item in self._kept if any(item[0] < b and item[0] + size > a for a, b in ranges))
        else:
            passes = self.capture.gradients(batches, self.objective, self.q)
            yield from track(passes, f"gradients of {self.batches.name}", len(batches), self.progress)

    def own(self, rows: Int64[Tensor, " b"]) -> Int64[Tensor, " c"]:
        """Those of some rows of the whole data set that are here, by their place here."""
        own = rows - self.batches.first
        return own[(own >= 0) & (own < self.n)]

    def squared_norms(self) -> dict[str, Float64[Tensor, " n"]]:
        """Block → ‖g‖² of every row, made once, or taken from the store where there is one."""
        if self._norms is None:
            self._norms = self.by_row(_squared_norms)
        assert self._norms is not None
        return self._norms

    def tiles(self) -> Iterator[list[tuple[int, BlocksOfBatch]]]:
        """The gradients in stretches that fit the memory together; one stretch where all fit."""
        if self._kept is not None:
            yield self._kept
            return
        tile: list[tuple[int, BlocksOfBatch]] = []
        used = 0
        for start, blocks in self:
            size = sum(block.nbytes for block in blocks.values())
            if tile and used + size > self.memory:
                yield tile
                tile, used = [], 0
            tile.append((start, blocks))
            used += size
        yield tile


def _squared_norms(rows: GradientRows) -> dict[str, Float64[Tensor, " n"]]:
    found = {group: torch.empty(rows.n, dtype=torch.float64, device=rows.device) for group in rows.groups}
    if rows.keeping is not None and rows.keeping.place is not None:
        rows.keeping.fill_norms(rows, found)
        return found
    for start, blocks in rows:
        for group, block in blocks.items():
            found[group][start : start + block.n] = block.squared_norms()
    return found
