"""A bar that fills as a residual falls."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from refluence.progress import DELAY_SECONDS


class ConvergenceBar:
    """On a terminal, after two seconds: the decades that the largest residual has come from 1 to the tolerance."""

    def __init__(self, label: str, rtol: float, enabled: bool) -> None:
        console = Console(stderr=True)
        self.enabled = enabled and console.is_terminal
        self.label, self.decades = label, -math.log10(max(rtol, 1e-16))
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.task = self.bar.add_task(label, total=self.decades)
        self.begin, self.shown = time.monotonic(), False

    def __enter__(self) -> ConvergenceBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.shown:
            self.bar.stop()

    def step(self, step: int, residual: float) -> None:
        """Show a step and its residual."""
        if not self.enabled or time.monotonic() - self.begin < DELAY_SECONDS:
            return
        if not self.shown:
            self.bar.start()
            self.shown = True
        done = min(self.decades, max(0.0, -math.log10(max(residual, 1e-300))))
        self.bar.update(self.task, completed=done, description=f"{self.label}, step {step}, residual {residual:.1e}")
