"""Groups of models at work side by side, one thread each."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from refluence.progress import track
from refluence.training.group import Group

SAVE_SECONDS = 45.0
TICKS = 200

Event = tuple[str, Group | BaseException | None]


def run_groups(
    start: Callable[[Sequence[int]], Group],
    groups: Sequence[Sequence[int]],
    workers: int,
    folder: Path | None,
    progress: bool,
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Train groups, as many at once as there are workers, and yield each when it is finished.

    Threads, because the time goes to tensor operations, which run outside Python's lock; one thread of each for its
    operations, because the operations are too small to be shared well. A single group has all threads.

    Args:
        start: makes a group at its first step; called here, in the caller's thread.
        groups: the models of each.
        workers: groups at once.
        folder: where unfinished groups are saved, and looked for; None: nowhere.
        progress: show how far it is.
    """
    at_once = min(workers, len(groups))
    threads = torch.get_num_threads()
    events: queue.Queue[Event] = queue.Queue()
    stop = threading.Event()
    waiting, running = list(groups), []
    own_threads = threads // max(1, at_once) if threads >= at_once else 1

    def launch() -> None:
        group = start(waiting.pop(0))
        if folder is not None:
            group.resume(folder)
        thread = threading.Thread(target=_work, args=(group, own_threads, folder, events, stop), daemon=True)
        running.append(thread)
        thread.start()

    def finished() -> Iterator[Group | None]:
        """None a tick, a group when it is done."""
        left = len(groups)
        for _ in range(at_once):
            launch()
        while left:
            kind, what = events.get()
            if kind == "failed":
                assert isinstance(what, BaseException)
                raise what
            if kind == "done":
                assert isinstance(what, Group)
                left -= 1
                yield what
                if waiting:
                    launch()
            else:
                yield None

    try:
        for group in track(finished(), "training", total=len(groups) * (TICKS + 1), enabled=progress):
            if group is None:
                continue
            yield group.models, group.states
            if folder is not None:  # only now has the caller what it needs
                (folder / group.name).unlink(missing_ok=True)
    finally:
        stop.set()
        for thread in running:
            thread.join()
        torch.set_num_threads(threads)


def _work(group: Group, threads: int, folder: Path | None, events: queue.Queue[Event], stop: threading.Event) -> None:
    saved = time.monotonic()
    told = 0

    def after() -> bool:
        nonlocal saved, told
        while told < TICKS * group.done // group.total:
            told += 1
            events.put(("tick", None))
        if folder is not None and time.monotonic() - saved > SAVE_SECONDS:
            group.save(folder)
            saved = time.monotonic()
        return not stop.is_set()

    try:
        torch.set_num_threads(threads)
        if group.advance(after):
            events.put(("done", group))
    except BaseException as error:
        events.put(("failed", error))
