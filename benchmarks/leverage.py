"""Leverage scores beside the least that could do: `python -m benchmarks.leverage [--quick] [--rows 1000000]`.

MNIST's 70,000 × 784 pixels in memory, against forming XᵀX once in float64 and against the singular value decomposition
of X; and a float32 matrix on disk, against reading it and forming its float64 Gram matrix once. Both sides take turns
in one process, the page cache is emptied of the file before each, and the median of the ratios is what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import refluence as rf
from refluence.zoo import load_dataset

Action = Callable[[], object]
ROWS, COLUMNS = 1_000_000, 512
STRETCH = 8192
REPETITIONS = 5


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leverage", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: whether it runs, not how fast")
    parser.add_argument("--rows", type=int, default=ROWS, help="of the matrix on disk")
    given = parser.parse_args()
    found = measure(given.quick, given.rows)
    print(json.dumps(found, indent=1))


def measure(quick: bool = False, rows: int = ROWS) -> dict[str, Any]:
    """Every figure: seconds, and ratios of one side to the other in the same turn."""
    return {**in_memory(2000 if quick else 60_000, 1 if quick else REPETITIONS), **on_disk(8000 if quick else rows)}


def pixels(n_train: int) -> torch.Tensor:
    """MNIST train and test images together, in [0, 1]."""
    data = load_dataset("mnist", n_train=n_train, n_test=n_train // 6)
    assert data.image is not None
    return torch.cat([data.image.pixels(x).flatten(1) for x in (data.train[0], data.test[0])]).double() / 255


def in_memory(n_train: int, repetitions: int) -> dict[str, Any]:
    X = pixels(n_train)
    array = X.numpy()
    found: dict[str, rf.LeverageScores] = {}

    def ours(name: str, ridge: float, method: str) -> Action:
        def run() -> None:
            found[name] = rf.leverage_scores(X, ridge, method, progress=False)

        return run

    sides: dict[str, Action] = {
        "gram": lambda: array.T @ array,
        "plain": ours("plain", 0.0, "auto"),
        "ridge": ours("ridge", 1e-3, "auto"),
        "exact": ours("exact", 0.0, "exact"),
    }
    seconds = take_turns(sides, repetitions)
    svd = timed(lambda: np.linalg.svd(array, full_matrices=False))
    plain, exact = found["plain"], found["exact"]
    return {
        "n": X.shape[0],
        "d": X.shape[1],
        "threads": torch.get_num_threads(),
        "seconds": {name: statistics.median(times) for name, times in seconds.items()} | {"svd": svd},
        "plain_over_gram": ratio(seconds, "plain", "gram"),
        "ridge_over_gram": ratio(seconds, "ridge", "gram"),
        "exact_over_gram": ratio(seconds, "exact", "gram"),
        "svd_over_plain": svd / statistics.median(seconds["plain"]),
        "rank": plain.rank,
        "plain_difference": float((plain.values - exact.values).abs().max()),
        "ridge_dimension": found["ridge"].effective_dimension,
        "ridge_largest": float(found["ridge"].values.max()),
    }


def on_disk(n: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="refluence-leverage-") as folder:
        path = Path(folder) / "X.npy"
        write(path, n)
        sides: dict[str, Action] = {
            "gram": lambda: read_and_form(path),
            "ridge": lambda: rf.leverage_scores(path, 1e-3, progress=False),
            "plain": lambda: rf.leverage_scores(path, progress=False),
        }
        seconds = take_turns(sides, 3, before=lambda: forget(path))
    return {
        "disk_n": n,
        "disk_d": COLUMNS,
        "disk_bytes": 4 * n * COLUMNS,
        "disk_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "disk_ridge_over_gram": ratio(seconds, "ridge", "gram"),
        "disk_plain_over_gram": ratio(seconds, "plain", "gram"),
    }


def write(path: Path, n: int) -> None:
    """A float32 matrix with a spectrum that falls by a thousand."""
    target = np.lib.format.open_memmap(path, "w+", np.float32, (n, COLUMNS))
    generator, scale = np.random.default_rng(0), np.logspace(0, -3, COLUMNS, dtype=np.float32)
    for start in range(0, n, STRETCH):
        target[start : start + STRETCH] = generator.standard_normal(target[start : start + STRETCH].shape, np.float32)
        target[start : start + STRETCH] *= scale
    target.flush()


def read_and_form(path: Path) -> np.ndarray:
    """XᵀX in float64, by one reading."""
    X = np.load(path, mmap_mode="r")
    total = np.zeros((COLUMNS, COLUMNS))
    for start in range(0, X.shape[0], STRETCH):
        rows = X[start : start + STRETCH].astype(np.float64)
        total += rows.T @ rows
    return total


def forget(path: Path) -> None:
    """Empty the page cache of a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def take_turns(sides: dict[str, Action], repetitions: int, before: Action | None = None) -> dict[str, list[float]]:
    """Seconds of every side, a turn each; the first turn is a warm-up where there are several."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repetitions + (repetitions > 1)):
        for name, action in sides.items():
            if before is not None:
                before()
            taken = timed(action)
            if turn or repetitions == 1:
                seconds[name].append(taken)
    return seconds


def timed(action: Action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """The median over turns of one side's seconds to the other's."""
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


if __name__ == "__main__":
    main()
