"""The results of a run, with the look-ups that the tables need."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

Results = dict[str, Any]

ONCE = ("fit", "gradients", "train side")
"""Stages that cost the same however many tests there are."""

INVERSES = ("solve", "ekfac", "lissa", "arnoldi", "nystroem", "harmonic")
"""The items that have a table of their own."""


class Found:
    """The results with the look-ups that the tables need."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.cases: dict[str, Results] = {case["name"]: case for case in results["cases"]}

    def runs(self, name: str) -> list[Results]:
        """The successful repetitions; none where the case was not run or failed."""
        runs = self.cases[name]["runs"] if name in self.cases else []
        return [] if any("error" in run for run in runs) else runs

    def error(self, name: str) -> str | None:
        return next((run["error"] for run in self.cases[name]["runs"] if "error" in run), None)

    def totals(self, name: str, without: Iterable[str] = ()) -> list[float]:
        return [
            sum(s for stage, s in self._stages(name, run).items() if stage not in without) for run in self.runs(name)
        ]

    def total(self, name: str, without: Iterable[str] = ()) -> float | None:
        totals = self.totals(name, without)
        return statistics.median(totals) if totals else None

    def stages(self, name: str) -> dict[str, float]:
        runs = [self._stages(name, run) for run in self.runs(name)]
        return {stage: statistics.median(run[stage] for run in runs) for stage in (runs[0] if runs else {})}

    def fact(self, name: str, fact: str) -> Any:
        values = [run["facts"][fact] for run in self.runs(name) if fact in run["facts"]]
        return statistics.median(values) if values and not isinstance(values[0], str) else (values or [None])[0]

    def peak(self, name: str) -> float | None:
        return max((run["peak_mb"] for run in self.runs(name)), default=None)

    def fastest(self, prefix: str) -> str | None:
        """The case of this prefix that took least, so that a peer is compared at its best."""
        known = {name: self.total(name) for name in self.cases if name.startswith(prefix)}
        done = {name: seconds for name, seconds in known.items() if seconds is not None}
        return min(done, key=lambda name: done[name]) if done else None

    def compared(self, name: str) -> Results:
        """How near its scores are to the exact ones; empty where they were not compared."""
        return self.results["compared"].get(name, {})

    def of_item(self, *items: str) -> list[str]:
        """The cases of these items that were run, in order."""
        return [name for name, case in self.cases.items() if case["item"] in items]

    def _stages(self, name: str, run: Results) -> dict[str, float]:
        """Seconds of the stages; what was done for some right-hand sides only is extrapolated to all of them."""
        units = self.cases[name]["units"]
        scale = self.results["size"]["n_test"] / units if units else 1.0
        return {stage: s * (1.0 if stage in ONCE else scale) for stage, s in run["stages"].items()}


def number(value: float | None, form: str) -> str:
    return "not measured" if value is None else form.format(value)


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def table(header: list[str], rows: Iterable[list[str]], align: str) -> str:
    rule = {"l": "---", "r": "---:"}
    lines = [header, [rule[letter] for letter in align], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
