"""spectrum-bounds by the published algorithm and by ours, on a common sub-grid, in one run; and both counted in full.

`python -m benchmarks.projection_grid --dataset mnist --model mlp --n-train 1000 --sizes 64 256 1024`

Published (sleepymalc/Projection-IF, `spectrum_bounds.py`): for every size and trial all gradients are projected, the
n×n kernel is formed and eigendecomposed in float64, and each λ takes three n×n×k products. Ours: the sketches are drawn
in the eigenvectors of the Gram matrix, with m×m systems where m < r, and a Cholesky factor for each λ or one
eigendecomposition.
The Gram matrix and its spectrum, which both need once for the exact scores, are timed apart.

Times are seconds of CPU, so that other work on the machine counts little. Both have the same gradients in memory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refluence.sketches import Gaussian
from refluence.studies.projection.errors import ErrorMeter
from refluence.studies.projection.gaussian import GramGaussian
from refluence.studies.projection.grid import Dampings
from refluence.studies.projection.problem import BLOCK, Problem, ProblemOptions
from refluence.studies.projection.spectral import Spectral
from refluence.studies.projection.spectrum_bounds import kept_dampings
from refluence.studies.projection.system import EIGENVECTORS_WORK, eigenvectors_pay


def published_errors(
    train: Tensor, tests: Tensor, m: int, seed: int, dampings: Sequence[float], meter: ErrorMeter
) -> list[list[float]]:
    """The published steps, with their float32 projections and float64 kernels; the errors by our own statistics."""
    sketch, n = Gaussian(m, seed=seed), len(train)
    projected, own = sketch.project(train).double(), sketch.project(tests).double()
    kernel, across = projected @ projected.T / n, projected @ own.T / n**0.5
    values, vectors = torch.linalg.eigh(kernel)
    values.clamp_(min=0.0)
    rotated = vectors.T @ across
    found = []
    for place, damping in enumerate(dampings):
        solved = vectors @ (rotated / (values + damping)[:, None])
        scores = (n**0.5 * across - n**0.5 * (kernel @ solved)) / damping
        found.append(meter.row(scores, place))
    return found


def published_work(n: int, k: int, d: int, m: int, dampings: int) -> float:
    """Multiply-adds of a size and a trial; the kernel's symmetry is used."""
    return (n + k) * d * m + n * n * m / 2 + n * k * m + EIGENVECTORS_WORK * n**3 / 3 + n * n * k * (1 + 2 * dampings)


def our_work(n: int, k: int, r: int, sizes: Sequence[int], dampings: int) -> float:
    """Multiply-adds of one trial over all sizes, without the Gram matrix and its spectrum."""
    low, high = [m for m in sizes if m < r], [m for m in sizes if m >= r]
    work = 0.0
    if low:
        top = max(low)
        work += top * r * (top + n + k)
    if high:
        work += max(low, default=0) * r * (r + k)
        before = max(low, default=0)
        for m in high:
            work += (r**3 / 3 + r * r * k if m - before >= r else (m - before) * r * (r + k)) + r * r * k
            before = m
    for s in (min(m, r) for m in sizes):
        if eigenvectors_pay(s, k, n, dampings):
            work += EIGENVECTORS_WORK * s**3 / 3 + s * s * (k + n) + dampings * n * s * k
        else:
            work += dampings * (s**3 / 3 + s * s * k + n * s * k)
    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--n-train", type=int, default=1000)
    parser.add_argument("--tests", type=int, default=100)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    problem = Problem(ProblemOptions(given.dataset, given.model, given.n_train, None, given.tests), progress=False)
    begin = time.process_time()
    spectral = Spectral.of_gram(problem.gram(), given.n_train)
    setup = time.process_time() - begin
    train, tests = (
        torch.cat([blocks[BLOCK].dense() for _, blocks in problem.rows(which)]).float() for which in ("train", "test")
    )
    n, k, d, r = len(train), len(tests), train.shape[1], spectral.rank
    dampings = tuple(kept_dampings(spectral, Dampings().values(), 1.0))
    meter = ErrorMeter(spectral, dampings, corrected=False)
    meter.without_sketch()  # exact scores and normalisers, which both need
    seconds = {"published": 0.0, "ours": 0.0}
    errors: dict[str, list[Any]] = {"published": [], "ours": []}
    for trial in range(given.trials):
        begin = time.process_time()
        errors["published"] += [
            published_errors(train, tests, m, 42 + trial, dampings, meter) for m in reversed(given.sizes)
        ]
        seconds["published"] += time.process_time() - begin
        begin = time.process_time()
        systems = GramGaussian(spectral).systems(42 + trial, given.sizes, set(given.sizes))
        errors["ours"] += [meter.measure(system)["plain"].tolist() for system in systems][::-1]
        seconds["ours"] += time.process_time() - begin
    column = meter.names.index("eps_95")
    levels = {name: np.array(values)[:, :, column] for name, values in errors.items()}
    full = [2**e for e in range(2, 17) if 2**e < d]
    counts = {
        "published": given.trials * sum(published_work(n, k, d, m, len(dampings)) for m in given.sizes),
        "ours": given.trials * our_work(n, k, r, given.sizes, len(dampings)),
    }
    complete = {
        "published": 5 * sum(published_work(5000, 500, d, m, len(dampings)) for m in full),
        "ours": 5 * our_work(5000, 500, 5000, full, len(dampings)),
    }
    found = {
        "dataset": given.dataset,
        "model": given.model,
        "n": n,
        "tests": k,
        "parameters": d,
        "rank": r,
        "sizes": given.sizes,
        "trials": given.trials,
        "dampings": len(dampings),
        "cpu_seconds": seconds,
        "cpu_seconds_of_the_gram_matrix_and_its_spectrum": setup,
        "times_faster": seconds["published"] / seconds["ours"],
        "times_faster_with_the_spectrum": seconds["published"] / (seconds["ours"] + setup),
        "multiply_adds": counts,
        "times_less_work": counts["published"] / counts["ours"],
        "full_grid_multiply_adds": complete,
        "full_grid_times_less_work": complete["published"] / complete["ours"],
        "largest_difference_of_mean_log_eps_95": float(
            np.abs(np.log(levels["ours"] / levels["published"]).reshape(given.trials, -1).mean(axis=0)).max()
        ),
    }
    print(json.dumps(found, indent=1))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
