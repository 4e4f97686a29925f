"""How near the saved scores of each method are to the exact ones of the curvature that it claims."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from benchmarks.protocol import Job, Measurement, run_worker


def compare(exact: np.ndarray, other: np.ndarray, unsure: np.ndarray) -> dict[str, float]:
    """Relative Frobenius error, largest error relative to the largest score, and mean Spearman correlation a test.

    The correlation is over the tests that the model is not too sure of (`unsure`): in float32 the gradient of the
    others is little but rounding, so that no program knows their order.
    """
    exact, unsure = exact[: len(other)], unsure[: len(other)]
    difference = other - exact
    return {
        "frobenius": float(np.linalg.norm(difference) / np.linalg.norm(exact)),
        "largest": float(np.abs(difference).max() / np.abs(exact).max()),
        "spearman": float(np.nanmean(spearman(exact[unsure], other[unsure]))) if unsure.any() else float("nan"),
        "tests": len(other),
    }


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The rank correlation of each row; NaN where a row is constant."""
    ranks = [rankdata(rows, axis=1) for rows in (first, second)]
    a, b = (rows - rows.mean(axis=1, keepdims=True) for rows in ranks)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(axis=1), norms, out=np.full(len(a), np.nan), where=norms > 0)


def work(job: Job, measurement: Measurement) -> None:
    exact = {name: np.load(path) for name, path in job.options["references"].items()}
    unsure = exact.pop("unsure")
    with measurement.stage("compare"):
        for name, (path, reference) in job.options["others"].items():
            other = np.load(Path(path))
            measurement.facts[name] = (
                compare(exact[reference], other, unsure)
                if np.isfinite(other).all()
                else {"error": f"{np.mean(~np.isfinite(other)):.1%} of the scores are not finite"}
            )


if __name__ == "__main__":
    run_worker(work)
