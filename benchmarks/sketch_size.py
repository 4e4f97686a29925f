"""Calibrates `rf.theory.sketch_size`: the errors of many sketches of real gradients against the size that was asked.

`python -m benchmarks.sketch_size --sketches 100 --out sketch_size.json`

For every data set and model: C from the gradients of n train rows, λ for several d_λ, m for several ratios m/d_λ. ε of
a sketch is Theorem 2's, ‖E‖ = max |τ̃−τ|/(√τ_0√τ_0') over all g, g' in range(C), with τ̃ at λ as published; beside it the
same maximum over the pairs of test and train gradients that there are. Gaussian sketches are drawn in the eigenbasis of
the Gram matrix, which has the same law for any number of parameters; the other kinds are applied to the gradients.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

import refluence as rf
from refluence.zoo import load_benchmark

SETTINGS = ("digits/lr", "digits/mlp", "mnist/lr", "mnist/mlp")
DIMENSIONS = (3.0, 15.0, 100.0)
ROWS_PER_DIMENSION = (2, 4, 12, 40, 120)
DELTAS = (0.5, 0.2, 0.05)


def gradients(setting: str, n: int, tests: int) -> tuple[Tensor, Tensor]:
    """Train and test gradients in float64."""
    benchmark = load_benchmark(*setting.split("/"), progress=False)
    train, test = (
        tuple(part[:count] for part in pair) for pair, count in ((benchmark.train, n), (benchmark.test, tests))
    )
    influence = rf.Influence(benchmark.task, solver=rf.solvers.Gram(), damping=1.0, dtype=torch.float64, progress=False)
    influence.fit(train)
    # No public call gives raw gradients; the rows are what the solver was given.
    sides = (influence._fitted().rows, influence._test_rows(test))
    G, V = (torch.cat([block.dense() for _, blocks in rows for block in blocks.values()]) for rows in sides)
    return G, V


def wishart(size: int, m: int, generator: np.random.Generator) -> Tensor:
    """PᵀP of an m×size Gaussian sketch, by Bartlett's decomposition where m ≥ size."""
    if m < size:
        P = torch.from_numpy(generator.standard_normal((m, size)))
        return P.T @ P / m
    L = np.tril(generator.standard_normal((size, size)), -1)
    np.fill_diagonal(L, np.sqrt(generator.chisquare(m - np.arange(size))))
    return torch.from_numpy(L @ L.T / m)


def errors(values: Tensor, sketched: Tensor, damping: float, units: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """(‖E‖, the largest error of the given pairs) from C = diag(values) and C̃."""
    eye = torch.eye(len(values), dtype=torch.float64)
    E = torch.diag(damping / (values + damping)) - damping * torch.cholesky_inverse(
        torch.linalg.cholesky(sketched + damping * eye)
    )
    norm = abs(float(eigsh(E.numpy(), k=1, which="LM", return_eigenvectors=False, tol=1e-3)[0]))
    return norm, float((units[0] @ E @ units[1].T).abs().max())


def sketched_grams(
    kind: str, m: int, sketches: int, values: Tensor, rows: Tensor, generator: np.random.Generator
) -> Iterator[Tensor]:
    """C̃ in the eigenbasis of C, of independent sketches."""
    roots = values.sqrt()
    for seed in range(sketches):
        if kind == "gaussian":
            yield roots[:, None] * wishart(len(values), m, generator) * roots
        else:
            sketch = {"sjlt": rf.sketches.SJLT, "rademacher": rf.sketches.Rademacher}[kind](m, seed=seed)
            projected = sketch.project(rows)
            yield projected @ projected.T


def measure(setting: str, kind: str, sketches: int, n: int, tests: int, dimensions: tuple[float, ...]) -> list[dict]:
    G, V = gradients(setting, n, tests)
    values, Q = torch.linalg.eigh(G @ G.T / n)
    kept = values > 1e-10 * values.max()
    values, Q = values[kept], Q[:, kept]
    cross = (V @ G.T) @ Q / (math.sqrt(n) * values)
    units = (
        cross / torch.linalg.vector_norm(cross, dim=1, keepdim=True),
        Q / torch.linalg.vector_norm(Q, dim=1, keepdim=True),
    )
    rows = Q.T @ G / math.sqrt(n)
    records = []
    for dimension in dimensions:
        if dimension > 0.5 * len(values):
            continue
        damping = rf.theory.damping_for(values, dimension)
        for ratio in ROWS_PER_DIMENSION:
            m = round(ratio * dimension)
            generator = np.random.default_rng(m)
            found = [
                errors(values, sketched, damping, units)
                for sketched in sketched_grams(kind, m, sketches, values, rows, generator)
            ]
            norms, pairs = (np.array(column) for column in zip(*found, strict=True))
            records.append(
                {
                    "setting": setting,
                    "sketch": kind,
                    "n": n,
                    "d": G.shape[1],
                    "rank": len(values),
                    "d_lambda": dimension,
                    "damping": damping,
                    "m": m,
                    "errors": norms.tolist(),
                    "pairs": pairs.tolist(),
                }
            )
    return records


def table(records: list[dict]) -> Iterator[str]:
    """Asked ε, the 95 % quantile of what sketches had, and the share of them within what is asked for each δ."""
    yield "| | sketch | d_λ | m | ε asked | 95 % of ε | pairs | " + " | ".join(f"δ = {x}" for x in DELTAS) + " |"
    yield "| --- " * (7 + len(DELTAS)) + "|"
    for r in records:
        asked = {delta: rf.theory.achieved_epsilon(r["m"], r["d_lambda"], delta) for delta in DELTAS}
        quantile, pairs = (np.quantile(r[name], 0.95) for name in ("errors", "pairs"))
        within = " | ".join(f"{np.mean(np.array(r['errors']) <= epsilon):.2f}" for epsilon in asked.values())
        numbers = f"{r['d_lambda']:g} | {r['m']} | {asked[0.05]:.3f} | {quantile:.3f} | {pairs:.4f}"
        yield f"| {r['setting']} | {r['sketch']} | {numbers} | {within} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sketches", type=int, default=100)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--tests", type=int, default=200)
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--kinds", nargs="+", default=("gaussian",), choices=("gaussian", "sjlt", "rademacher"))
    parser.add_argument("--dimensions", nargs="+", type=float, default=DIMENSIONS)
    parser.add_argument("--out", type=Path, help="write every error here, as JSON")
    arguments = parser.parse_args()
    records: list[dict] = []
    for setting in arguments.settings:
        for kind in arguments.kinds:
            found = measure(
                setting, kind, arguments.sketches, arguments.n, arguments.tests, tuple(arguments.dimensions)
            )
            print("\n".join(list(table(found))[2 if records else 0 :]), flush=True)
            records += found
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(records))


if __name__ == "__main__":
    main()
