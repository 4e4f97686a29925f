"""How near the saved scores of each method are to the exact ones of the Gram route."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from benchmarks.protocol import Job, Measurement, run_worker


def compare(exact: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Relative Frobenius error, largest error relative to the largest score, and mean Spearman correlation a test."""
    exact = exact[: len(other)]
    difference = other - exact
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant rows have no correlation; nanmean leaves them out
        correlations = [float(spearmanr(a, b).statistic) for a, b in zip(exact, other, strict=True)]
    return {
        "frobenius": float(np.linalg.norm(difference) / np.linalg.norm(exact)),
        "largest": float(np.abs(difference).max() / np.abs(exact).max()),
        "spearman": float(np.nanmean(correlations)),
        "tests": len(other),
    }


def work(job: Job, measurement: Measurement) -> None:
    exact = np.load(job.options["exact"])
    with measurement.stage("compare"):
        for name, path in job.options["others"].items():
            other = np.load(Path(path))
            measurement.facts[name] = (
                compare(exact, other)
                if np.isfinite(other).all()
                else {"error": f"{np.mean(~np.isfinite(other)):.1%} of the scores are not finite"}
            )


if __name__ == "__main__":
    run_worker(work)
