"""Leverage scores beside the least that could do."""

from __future__ import annotations

from typing import Any

from benchmarks.report.found import Found, seconds, table

WITHIN_GRAM, BEYOND_SVD, WITHIN_READING = 4.0, 5.0, 2.5


def leverage(found: Found) -> str:
    """The ratios that were asked for, with what each side took."""
    runs = found.runs("leverage")
    if not runs:
        return ""
    facts: dict[str, Any] = runs[-1]["facts"]
    took, disk = facts["seconds"], facts["disk_seconds"]
    memory = f"{facts['n']:,} × {facts['d']} MNIST pixels"
    stored = f"{facts['disk_n']:,} × {facts['disk_d']} float32 on disk"
    rows = [
        _within(
            f"plain leverage of {memory} ÷ XᵀX", facts["plain_over_gram"], WITHIN_GRAM, took["plain"], took["gram"]
        ),
        _within(
            f"ridge leverage of {memory} ÷ XᵀX", facts["ridge_over_gram"], WITHIN_GRAM, took["ridge"], took["gram"]
        ),
        [
            f"SVD of {memory} ÷ plain leverage",
            f"{facts['svd_over_plain']:.2f}",
            f"≥ {BEYOND_SVD:g}",
            _verdict(facts["svd_over_plain"] >= BEYOND_SVD),
            seconds(took["svd"]),
            seconds(took["plain"]),
        ],
        _within(
            f"ridge leverage of {stored} ÷ reading it and XᵀX",
            facts["disk_ridge_over_gram"],
            WITHIN_READING,
            disk["ridge"],
            disk["gram"],
        ),
        _within(
            f"plain leverage of {stored} ÷ reading it and XᵀX",
            facts["disk_plain_over_gram"],
            WITHIN_READING,
            disk["plain"],
            disk["gram"],
        ),
    ]
    return (
        "## Leverage scores\n\n"
        + table(["", "ratio", "target", "", "seconds", "and"], rows, "lrrlrr")
        + f"\n\nXᵀX is formed by NumPy in float64 (half of it computed). Median ratios of turns taken in one process. "
        f"Rank {facts['rank']}; the plain scores differ by {facts['plain_difference']:.1e} from those by QR of X and "
        f"the SVD of R, which took {seconds(took['exact'])} s; d_λ = {facts['ridge_dimension']:.1f} at λ = 1e-3. "
        "`python -m benchmarks.leverage` measures this alone."
    )


def _within(text: str, ratio: float, target: float, one: float, other: float) -> list[str]:
    return [text, f"{ratio:.2f}", f"≤ {target:g}", _verdict(ratio <= target), seconds(one), seconds(other)]


def _verdict(met: bool) -> str:
    return "met" if met else "missed"
