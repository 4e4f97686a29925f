"""What a worker process holds: the model and the data once, and its stretches of the train side."""

from __future__ import annotations

import contextlib
import gc
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import psutil
import torch

from refluence.batches import Batches
from refluence.curvature import Curvature
from refluence.distributed.recipe import Recipe, Rows
from refluence.distributed.trees import moved
from refluence.errors import ClusterError
from refluence.execution import out_of_memory, parse_bytes
from refluence.gradients.capture import Capture
from refluence.gradients.parts import Pass, Tree, added, taken
from refluence.settings import working_model
from refluence.skipping import bad_rows

T = TypeVar("T")

MOST_SITES = 2
SHARE_OF_MEMORY = 0.6
"""Of what a worker's memory leaves for gradients and projected rows."""
FULL = 0.7
"""Of a worker's memory, above which what is kept is dropped: at 0.8 Dask gives a worker nothing more to do."""

_sites: OrderedDict[str, _Site] = OrderedDict()
# A model's hooks and modes are of one pass at a time.
_busy = threading.Lock()


@dataclass(frozen=True)
class Order:
    """What one task is about.

    Args:
        key: of the fit.
        rows, size: the stretch, and its batches.
        among: how many stretches share a worker's memory.
        home: address of the worker that keeps this stretch; another does not.
        of: what of the part's curvature a pass takes.
        given: name of the pass's arguments.
    """

    key: str
    rows: Rows
    size: int
    among: int
    home: str
    of: str
    given: str


@dataclass(frozen=True, eq=False)
class _Part:
    curvature: Curvature
    memory: float

    @property
    def size(self) -> int:
        return self.curvature.rows.batches.batch_size


class _Site:
    """A fit's train side in this process."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model = working_model(recipe.settings)
        self.device = next(self.model.parameters()).device
        self.batches: Batches = recipe.batches(self.device)
        self.most = self.batches.batch_size
        """Rows of a batch that the memory has not yet been too small for."""
        self.parts: OrderedDict[Rows, _Part] = OrderedDict()
        self.given: tuple[str, Any] = "", ()
        self.free = self._free()

    @cached_property
    def capture(self) -> Capture:
        """What makes the gradients."""
        return self.recipe.capture()

    def part(self, order: Order) -> Curvature:
        """The curvature of a stretch, kept as long as there is room."""
        found = self.parts.get(order.rows)
        if found is None or found.size > min(order.size, self.most):
            self.parts.pop(order.rows, None)
            share = self.free / order.among
            while self.parts and share + sum(part.memory for part in self.parts.values()) > self.free * 1.001:
                self.parts.popitem(last=False)
            kept = share if self.recipe.keeps else 0.0
            found = _Part(self.recipe.curvature(self.capture, self.stretch(order), kept), share)
            self.parts[order.rows] = found
        self.parts.move_to_end(order.rows)
        return found.curvature

    def stretch(self, order: Order) -> Batches:
        """The data of a stretch."""
        batches, size = self.batches.stretch(*order.rows), min(order.size, self.most)
        return batches.of_size(size) if size < batches.batch_size else batches

    def arguments(self, name: str, given: bytes) -> tuple[Any, ...]:
        """What a pass is given, on the device; unpickled for the first of its stretches."""
        if self.given[0] != name:
            self.given = "", ()
            self.given = name, moved(pickle.loads(given), self.device)
        found: tuple[Any, ...] = self.given[1]
        return found

    def _free(self) -> float:
        """Bytes that all parts here may keep together."""
        execution = self.recipe.settings.execution
        if execution.memory is not None:
            return float(parse_bytes(execution.memory))
        if self.device.type != "cpu":
            return float(execution.budget(self.device))
        limit = _limit()
        return SHARE_OF_MEMORY * max(0, limit - _used()) if limit else float(execution.budget(self.device))


def run(order: Order, recipe: bytes, function: Pass, given: bytes, more: Any = ()) -> Tree:
    """function(part, *given, *more) of one stretch, on the CPU; in smaller batches where the memory is too small.

    Args:
        order: which stretch of which fit.
        recipe: pickled.
        given: pickled arguments.
        more: arguments that another worker made.

    Raises:
        ClusterError: single rows are too large for the memory.
    """
    with _busy:
        site = _site(order.key, recipe)
        arguments = (*site.arguments(order.given, given), *moved(more, site.device))
        try:
            return _in_memory(site, order, lambda: _result(site, order, function, arguments))
        finally:
            if order.home not in _addresses():
                site.parts.pop(order.rows, None)
            _relieve()


def _result(site: _Site, order: Order, function: Pass, arguments: tuple[Any, ...]) -> Tree:
    return moved(function(taken(site.part(order), order.of), *arguments), torch.device("cpu"))


def bad_rows_of(order: Order, recipe: bytes, most: int | None) -> dict[int, str]:
    """The bad rows of a stretch by their number in the whole data set, with what is wrong with them."""
    with _busy:
        site = _site(order.key, recipe)
        task = site.recipe.settings.task

        def search() -> dict[int, str]:
            return bad_rows(task, site.model, site.stretch(order), progress=False, most=most)

        return {order.rows[0] + row: reason for row, reason in _in_memory(site, order, search).items()}


def _in_memory(site: _Site, order: Order, make: Callable[[], T]) -> T:
    """What `make` returns, in batches that fit the memory."""
    while True:
        size = min(order.size, site.most)
        try:
            return make()
        except Exception as error:
            if not out_of_memory(error):
                raise
            if size == 1:
                first, stop = order.rows
                raise ClusterError(
                    f"a worker has too little memory for train rows {first} to {stop - 1} in batches of one row "
                    f"({error}): give the workers more"
                ) from error
        # Out of the handler, whose traceback holds the tensors that did not fit.
        site.most = size // 2
        site.parts.clear()
        gc.collect()
        if site.device.type == "cuda":
            torch.cuda.empty_cache()


def _site(key: str, recipe: bytes) -> _Site:
    if key not in _sites:
        while len(_sites) >= MOST_SITES:
            _sites.popitem(last=False)
        made: Recipe = pickle.loads(recipe)
        _sites[key] = _Site(made.on(_device(made)))
    _sites.move_to_end(key)
    return _sites[key]


def _device(recipe: Recipe) -> torch.device | str | None:
    """This worker's GPU where it has one and nothing else was asked for."""
    asked = recipe.settings.device
    return "cuda" if asked is None and torch.cuda.is_available() else asked


def _relieve() -> None:
    """Drop what is kept where it, with all else, fills the worker's memory."""
    limit = _limit()
    if limit and _used() > FULL * limit:
        for site in _sites.values():
            site.parts.clear()
        gc.collect()


def _limit() -> int:
    """Bytes at which this worker is ended, 0 where nobody set any."""
    with contextlib.suppress(ImportError, ValueError):
        from distributed import get_worker

        return int(get_worker().memory_manager.memory_limit or 0)
    return 0


def _used() -> int:
    return int(psutil.Process().memory_info().rss)


def _addresses() -> set[str]:
    """Those of this worker: its own, and the one that it gives to others where it has another."""
    from distributed import get_worker

    worker = get_worker()
    return {str(worker.address), str(getattr(worker, "contact_address", None))}


def summed(trees: Sequence[Tree]) -> Tree:
    """The sum of trees, in their order."""
    total = moved(trees[0], torch.device("cpu"), copy=True) if len(trees) > 1 else trees[0]
    for tree in trees[1:]:
        total = added(total, tree)
    return total
