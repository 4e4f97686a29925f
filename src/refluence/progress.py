"""Progress bars with time left, for anything over two seconds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

DELAY_SECONDS = 2.0


def track(items: Iterable[T], description: str, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """Yield `items`; on a terminal, show a bar on standard error once two seconds have passed."""
    console = Console(stderr=True)
    if not enabled or not console.is_terminal:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task(description, total=total)
    begin, shown = time.monotonic(), False
    try:
        for done, item in enumerate(items, start=1):
            yield item
            if not shown and time.monotonic() - begin > DELAY_SECONDS:
                bar.start()
                shown = True
            bar.update(task, completed=done)
    finally:
        if shown:
            bar.stop()
