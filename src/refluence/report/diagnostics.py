"""What a solver reports of its preparation and its last solve, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refluence.report.formatting import count, number, percent, shorten

MAX_NAMES = 6
LONGEST_PATH = 200
RESIDUAL, NEGATIVE = "Relative residual", "Negative eigenvalues"


@dataclass(frozen=True)
class Finding:
    """One thing that a reader of the scores should know; `caution` where they may not be what they seem."""

    name: str
    value: str
    reading: str
    caution: bool = False

    @property
    def sentence(self) -> str:
        """All in one line."""
        return f"{self.value}, {self.reading}"


def findings(diagnostics: Mapping[str, Any]) -> tuple[Finding, ...]:
    """What is worth saying of `Influence.diagnostics`."""
    found = (_residual, _negative, _rank, _layers, _stored)
    return tuple(one for finding in found for one in finding(diagnostics))


def _residual(diagnostics: Mapping[str, Any]) -> Iterator[Finding]:
    residual = _numbers(diagnostics.get("residual"))
    if not residual:
        return
    steps = _numbers(diagnostics.get("iterations")) or _numbers(diagnostics.get("depth"))
    reading = f"after {count(int(max(steps)), 'step')}" if steps else "of the last solve"
    if "residual_bias" in diagnostics:
        bias, noise = diagnostics["residual_bias"], diagnostics["residual_noise"]
        reading += f"; {number(bias, 2)} of it truncation, {number(noise, 2)} noise"
    missed = len(residual) - int(diagnostics.get("converged", len(residual)))
    if missed:
        reading += f"; {missed:,} of {count(len(residual), 'right-hand side')} did not reach the tolerance"
    yield Finding(RESIDUAL, number(max(residual), 2), reading, caution=missed > 0)


def _negative(diagnostics: Mapping[str, Any]) -> Iterator[Finding]:
    below = sum(_numbers(diagnostics.get("negative_shifted")))
    negative = max(sum(_numbers(diagnostics.get("negative_eigenvalues"))), below)
    if not negative:
        return
    reading = "made positive by l2 and damping"
    if below:
        reading = f"{below:,.0f} stay negative with the damping: scores need not be effects of a removal"
    yield Finding(NEGATIVE, f"{negative:,.0f}", reading, caution=below > 0)


def _rank(diagnostics: Mapping[str, Any]) -> Iterator[Finding]:
    shares = _numbers(diagnostics.get("captured_trace"))
    ranks = _numbers(diagnostics.get("rank"))
    if not shares or not ranks:
        return
    held = percent(min(shares)) if len(shares) == 1 else f"at least {percent(min(shares))}"
    yield Finding("Rank", f"{sum(ranks):,.0f}", f"holds {held} of the trace of the curvature")


def _layers(diagnostics: Mapping[str, Any]) -> Iterator[Finding]:
    whole, diagonal = list(diagnostics.get("dense blocks", ())), list(diagnostics.get("diagonal blocks", ()))
    if not whole and not diagonal:
        return
    parts = [
        f"{_names(names)} {how}" for names, how in ((whole, "taken whole"), (diagonal, "by the diagonal")) if names
    ]
    name, value = "Without a Kronecker form", count(len(whole) + len(diagonal), "parameter")
    yield Finding(name, value, "; ".join(parts), caution=bool(diagonal))


def _names(names: Sequence[str], length: int = 60) -> str:
    shown = ", ".join(shorten(str(name), length) for name in names[:MAX_NAMES])
    return f"{shown} and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else shown


def _numbers(value: Any) -> list[float]:
    """The numbers in a number, a list or a dict by block."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [float(item) for item in value.values()]
    return [float(item) for item in value] if isinstance(value, Sequence) else [float(value)]


def _stored(diagnostics: Mapping[str, Any]) -> Iterator[Finding]:
    found = diagnostics.get("store")
    if not found:
        return
    stores = found if isinstance(found, list) else [found]
    read, made = (sum(store[name] for store in stores) for name in ("rows_read", "rows_made"))
    damaged = sum(len(store["damaged"]) for store in stores)
    again = f", {count(damaged, 'damaged file')}" if damaged else ""
    rounding = max((error for store in stores for error in store["rounding_error"].values()), default=0.0)
    stored = f"; stored with a rounding error of {number(rounding, 2)}" if rounding else ""
    place = _names(list(dict.fromkeys(store["store"] for store in stores)), LONGEST_PATH)
    yield Finding("Store", count(read, "row") + " read", f"{made:,} made, in {place}{again}{stored}")
