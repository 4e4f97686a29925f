"""A scatter of measured against predicted in one square, with the line y = x, as coordinates for an inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from refluence.report.formatting import number

SIDE = 100.0
MARGIN = 0.06
TICKS = 5


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, 0 at the left or the bottom and 100 at the other end."""

    place: float
    label: str


@dataclass(frozen=True)
class Dot:
    """One point in the square, with what it says when pointed at."""

    x: float
    y: float
    title: str
    series: int = 0


@dataclass(frozen=True)
class Scatter:
    """Points in a square of side 100 whose two axes have the same scale, so that y = x is its diagonal."""

    dots: tuple[Dot, ...]
    ticks: tuple[Tick, ...]
    zero: float | None

    def up(self, place: float) -> float:
        """A place on the vertical axis as an SVG coordinate, which counts downwards."""
        return SIDE - place


def scatter(points: Sequence[tuple[float, float, str, int]]) -> Scatter | None:
    """The scatter of (predicted, measured, title, series); None where no point is finite."""
    finite = [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]
    if not finite:
        return None
    values = [value for x, y, _, _ in finite for value in (x, y)]
    low, high = min(*values, 0.0), max(*values, 0.0)
    room = MARGIN * (high - low) or 1.0
    low, high = low - room, high + room

    def place(value: float) -> float:
        return SIDE * (value - low) / (high - low)

    dots = tuple(Dot(place(x), place(y), title, series) for x, y, title, series in finite)
    ticks = tuple(Tick(place(value), number(value, 2)) for value in round_values(low, high))
    return Scatter(dots, ticks, place(0.0))


def round_values(low: float, high: float, most: int = TICKS) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten in [low, high], `low` < `high`."""
    exponent = math.floor(math.log10((high - low) / most))
    steps = (factor * 10.0**power for power in (exponent, exponent + 1) for factor in (1, 2, 5))
    for step in steps:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [round(k * step, 12 - exponent) for k in range(first, last + 1)]
    return []
