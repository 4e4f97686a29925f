"""What a worker process holds: the model and the data once, and its stretches of the train side."""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from refluence.batches import Batches
from refluence.curvature import Curvature
from refluence.distributed.recipe import Recipe, Rows
from refluence.distributed.trees import moved
from refluence.errors import RefluenceError
from refluence.execution import parse_bytes
from refluence.gradients.capture import Capture
from refluence.gradients.parts import Pass, Tree, added, taken

MOST_SITES = 2
SHARE_OF_MEMORY = 0.6
"""Of a worker's memory that may hold gradients and projected rows."""

_sites: OrderedDict[str, _Site] = OrderedDict()
# A model's hooks and modes are of one pass at a time.
_busy = threading.Lock()


class _Site:
    """A fit's train side in this process."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.capture: Capture = recipe.capture()
        self.device = next(iter(self.capture.parameters.values())).device
        self.batches: Batches = recipe.batches(self.device)
        self.parts: dict[Rows, Curvature] = {}

    def part(self, rows: Rows, size: int, among: int) -> Curvature:
        """The curvature of a stretch in batches of at most this size; those of a part once cut stay smaller."""
        found = self.parts.get(rows)
        if found is None or found.rows.batches.batch_size > size:
            batches = self.batches.stretch(*rows)
            if size < batches.batch_size:
                batches = batches.of_size(size)
            self.parts.pop(rows, None)
            found = self.recipe.curvature(self.capture, batches, self.memory() / among)
            self.parts[rows] = found
        return found

    def memory(self) -> float:
        """Bytes that all parts here may keep together."""
        execution = self.recipe.settings.execution
        if execution.memory is not None:
            return float(parse_bytes(execution.memory))
        if self.device.type != "cpu":
            return float(execution.budget(self.device))
        limit = None
        with contextlib.suppress(ImportError, ValueError):
            from distributed import get_worker

            limit = get_worker().memory_manager.memory_limit
        return SHARE_OF_MEMORY * (limit or execution.budget(self.device))


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


def run(
    key: str, recipe: bytes, rows: Rows, size: int, among: int, of: str, function: Pass, given: bytes, more: Any = ()
) -> Tree:
    """function(part, *given, *more) of one stretch, on the CPU; in smaller batches where the memory is too small.

    Args:
        key: of the fit.
        recipe: pickled.
        rows, size: the stretch, and its batches.
        among: how many stretches share this worker's memory.
        of: what of the part's curvature the function takes.
        given: pickled arguments.
        more: arguments that another worker made.
    """
    with _busy:
        site = _site(key, recipe)
        arguments = (*pickle.loads(given), *more)
        while True:
            part = site.part(rows, size, among)
            try:
                return moved(function(taken(part, of), *moved(arguments, site.device)), torch.device("cpu"))
            except Exception as error:
                if not out_of_memory(error) or part.rows.batches.batch_size == 1:
                    raise
                size = part.rows.batches.batch_size // 2
                site.parts.pop(rows)
                del part
                if site.device.type == "cuda":
                    torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of a memory that is too small."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    wanting = "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text
    return isinstance(error, RuntimeError) and not isinstance(error, RefluenceError) and wanting


def summed(trees: Sequence[Tree]) -> Tree:
    """The sum of trees, in their order."""
    total = moved(trees[0], torch.device("cpu"), copy=True) if len(trees) > 1 else trees[0]
    for tree in trees[1:]:
        total = added(total, tree)
    return total
