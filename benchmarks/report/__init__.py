"""docs/benchmarks.md from the results: everything in it, numbers and words, is written anew by each run."""

from __future__ import annotations

from benchmarks.report.agreement import agreement
from benchmarks.report.found import Found, Results
from benchmarks.report.inverses import inverses
from benchmarks.report.leverage import leverage
from benchmarks.report.limits import limits
from benchmarks.report.notes import notes
from benchmarks.report.shares import shares
from benchmarks.report.targets import target_section
from benchmarks.report.times import failures, head, time_section


def render(results: Results) -> str:
    """The whole page."""
    found = Found(results)
    sections = (head, target_section, inverses, time_section, failures, agreement, limits, leverage, shares, notes)
    parts = [section(found) for section in sections]
    return "\n\n".join(part for part in parts if part) + "\n"
