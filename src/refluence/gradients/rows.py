"""The per-example gradients of a whole data set, as blocks batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from refluence.batches import Batches
from refluence.gradients.blocks import DenseBlock, accumulation_dtype
from refluence.gradients.capture import Capture
from refluence.gradients.functional import Objective
from refluence.gradients.joint import JointBlock, gather
from refluence.gradients.matrices import LayerMatrix
from refluence.gradients.parts import Parts, Pass, Tree
from refluence.progress import track

if TYPE_CHECKING:
    from refluence.store.held import Report
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
        keeping: how these gradients, or what is made of them, are held and stored; None: in memory.
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
        self._held: tuple[dict[str, Tensor], Report | None] | None = None
        self._some: dict[int, BlocksOfBatch] = {}
        self._used, self._fits = 0, True
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

    @property
    def matrix_bytes(self) -> int:
        """Bytes of all gradients as rows of a matrix."""
        width = sum(self.dimension(group) for group in self.groups)
        return self.n * width * accumulation_dtype(self.dtype).itemsize

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
    def whole(self) -> bool:
        """Whether whole gradients are held, as rows of a matrix, where the run asks."""
        return self.keeping is not None and self.keeping.whole

    @property
    def kept(self) -> bool:
        """Whether all gradients are in the memory of their device, so that further passes cost nothing."""
        if self.whole:
            return self._held is not None and not self.keeping.elsewhere(self.device)  # type: ignore[union-attr]
        return self._kept is not None

    @property
    def at_hand(self) -> bool:
        """Whether further passes make no gradient."""
        return self._held is not None or self._kept is not None

    def hold(self) -> Report | None:
        """Take the gradients from their store, or make them; what the store did, where there is one."""
        return self._matrices()[1]

    def _matrices(self) -> tuple[dict[str, Float[Tensor, "n d"]], Report | None]:
        if self._held is None:
            assert self.keeping is not None
            self._held, self.passed = self.keeping.hold(self), True
        return self._held

    def __iter__(self) -> Iterator[tuple[int, BlocksOfBatch]]:
        """(first row, group → gradients) for each batch."""
        return self._cut() if self.whole else self.made()

    def _cut(self, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, BlocksOfBatch]]:
        """The held matrices in batches, and by the layers of the capture."""
        matrices, _ = self._matrices()
        size = self.batches.batch_size
        starts = range(first // size * size, self.n if stop is None else stop, size)
        shown = self.progress and not self.kept
        for start in track(starts, f"reading gradients of {self.batches.name}", len(starts), shown):
            blocks = {}
            for group, layers in self.capture.layout.items():
                rows = matrices[group][start : start + size].to(self.device)
                parts = tuple(DenseBlock(gather(rows.T, columns).T) for _, columns in layers)
                blocks[group] = JointBlock(parts, tuple(columns for _, columns in layers))
            yield start, blocks

    def made(self) -> Iterator[tuple[int, BlocksOfBatch]]:
        """The batches as they are made, or kept in memory."""
        if self._kept is not None:
            yield from self._kept
            return
        yield from self._made(self.batches)
        self.passed = True

    def over(self, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, BlocksOfBatch]]:
        """The batches that hold rows of any of the ranges [start, stop), made or kept; other rows are not made."""
        batches = self.batches.holding(ranges)
        if len(batches) == len(self.batches):
            yield from self.made()
        elif self._kept is not None:
            size = self.batches.batch_size
            yield from (item for item in self._kept if any(item[0] < b and item[0] + size > a for a, b in ranges))
        else:
            yield from self._made(batches)

    def within(self, start: int, stop: int) -> Iterator[tuple[int, BlocksOfBatch]]:
        """The batches that hold rows of [start, stop)."""
        return self._cut(start, stop) if self.whole else self.over([(start, stop)])

    def _made(self, batches: Batches) -> Iterator[tuple[int, BlocksOfBatch]]:
        """Some or all of the batches, kept while they fit."""
        passes = self.capture.gradients(batches, self.objective, self.q)
        for start, blocks in track(passes, f"gradients of {self.batches.name}", len(batches), self.progress):
            self._keep(start, blocks)
            yield start, blocks

    def _keep(self, start: int, blocks: BlocksOfBatch) -> None:
        if not self._fits or start in self._some:
            return
        self._some[start] = blocks
        self._used += sum(block.nbytes for block in blocks.values())
        if self._used > self.memory:
            self._some, self._fits = {}, False
        elif len(self._some) == len(self.batches):
            self._kept, self._some = sorted(self._some.items(), key=lambda item: item[0]), {}

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
        if self.kept:
            yield list(self)
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
    if rows.keeping is not None and rows.keeping.place is not None and not rows.whole:
        rows.keeping.fill_norms(rows, found)
        return found
    for start, blocks in rows:
        for group, block in blocks.items():
            found[group][start : start + block.n] = block.squared_norms()
    return found
