"""What the part "Checked against reality" shows: predicted against measured changes of examples really removed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from refluence.report.formatting import shorten, signed, statistic
from refluence.report.predictions import Example
from refluence.report.presentation import View
from refluence.report.scatter import Scatter, scatter

if TYPE_CHECKING:
    from refluence.evaluation.verification import Verification

MAX_DOTS = 1000
MAX_REMOVALS = 100
SHAPES = 6


@dataclass(frozen=True)
class Pair:
    """The predicted and the measured change of one test example without one removed example.

    `newton` is the Newton-corrected prediction, None where there is none.
    """

    removed: str
    test: str
    predicted: float
    newton: float | None
    measured: float


@dataclass(frozen=True)
class Removal:
    """Examples that were removed together, usually one; `largest` is the pair with the largest measured change."""

    rows: tuple[int, ...]
    view: View
    label: str
    prediction: str
    differs: bool
    largest: Pair
    gradient_norm: float
    iterations: int
    converged: bool

    @property
    def name(self) -> str:
        """The rows in words."""
        return _name(self.rows)


@dataclass(frozen=True)
class Checked:
    """The part of the page; `pairs` are what the scatter shows, of `count` that were measured."""

    sentence: str
    slope: str
    spearman: str
    pearson: str
    r2: str
    removals: tuple[Removal, ...]
    removed: int
    pairs: tuple[Pair, ...]
    count: int
    picture: Scatter | None

    @property
    def corrected(self) -> bool:
        """Whether there are Newton-corrected predictions."""
        return any(pair.newton is not None for pair in self.pairs)

    @property
    def unconverged(self) -> int:
        """How many of the refits shown did not reach their tolerance."""
        return sum(not removal.converged for removal in self.removals)


def removed_rows(verification: Verification | None) -> list[tuple[int, ...]]:
    """The train rows of each removal, at most 100 of them."""
    if verification is None:
        return []
    return list(dict.fromkeys(_rows(removed) for removed in verification.frame["removed"].tolist()))[:MAX_REMOVALS]


def checked(verification: Verification, examples: dict[int, Example], views: dict[int, View]) -> Checked:
    """The part of a verification whose removed rows were examined."""
    rows = [_rows(removed) for removed in verification.frame["removed"].tolist()]
    order = {key: i for i, key in enumerate(dict.fromkeys(rows))}
    every = [
        (key, _pair(key, record), record)
        for key, record in zip(rows, verification.frame.to_dict("records"), strict=True)
    ]
    # an even choice of all pairs, so that the picture shows what the statistics are of
    shown = every[:: max(1, -(-len(every) // MAX_DOTS))]
    points = [(pair.predicted, pair.measured, _title(pair), order[key] % SHAPES) for key, pair, _ in shown]
    return Checked(
        sentence=shorten(str(verification.sentence), 600),
        slope=statistic(verification.slope),
        spearman=statistic(verification.spearman),
        pearson=statistic(verification.pearson),
        r2=statistic(verification.r2),
        removals=tuple(
            _removal(key, [(pair, record) for other, pair, record in every if other == key], examples, views)
            for key in list(order)[:MAX_REMOVALS]
        ),
        removed=len(order),
        pairs=tuple(pair for _, pair, _ in shown),
        count=len(every),
        picture=scatter(points),
    )


def _removal(
    rows: tuple[int, ...],
    part: list[tuple[Pair, dict[Any, Any]]],
    examples: dict[int, Example],
    views: dict[int, View],
) -> Removal:
    verdict = examples[rows[0]].verdict
    return Removal(
        rows=rows,
        view=views[rows[0]],
        label=verdict.label,
        prediction=verdict.prediction,
        differs=verdict.correct is False,
        largest=max((pair for pair, _ in part), key=lambda pair: abs(np.nan_to_num(pair.measured))),
        gradient_norm=max(float(record["gradient_norm"]) for _, record in part),
        iterations=max(int(record["iterations"]) for _, record in part),
        converged=all(bool(record["converged"]) for _, record in part),
    )


def _pair(rows: tuple[int, ...], record: dict[Any, Any]) -> Pair:
    newton = float(record.get("newton", math.nan))
    return Pair(
        removed=_name(rows),
        test=str(record["test"]),
        predicted=float(record["predicted"]),
        newton=newton if math.isfinite(newton) else None,
        measured=float(record["measured"]),
    )


def _title(pair: Pair) -> str:
    return (
        f"without train {pair.removed}, test row {pair.test}: predicted {signed(pair.predicted)}, "
        f"measured {signed(pair.measured)}"
    )


def _rows(removed: Any) -> tuple[int, ...]:
    """The rows of an entry of the column `removed`, a row or several."""
    return (int(removed),) if pd.api.types.is_scalar(removed) else tuple(int(row) for row in removed)


def _name(rows: tuple[int, ...]) -> str:
    if len(rows) == 1:
        return f"row {rows[0]}"
    some = ", ".join(str(row) for row in rows[:4])
    return f"rows {some}" + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
