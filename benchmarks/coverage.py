"""Do the error bars of sketched scores cover? Shares of all pairs whose 95 % interval holds the exact score.

`python -m benchmarks.coverage --dataset mnist --model lr mlp --sketches 200`

For every size m and kind of sketch, over independent sketches: the corrected scores with their standard errors, the
plain ones about the damping κ that they estimate, and the plain ones about the damping that is on them with the error
that one would give without knowing that a sketch adds damping (κ = μ, κ' = 1). All that an interval is made of is from
its sketch; the exact scores are from the Gram matrix. Tests are test images, whose gradients lie partly outside the
range of the curvature. Gaussian sketches are drawn in Gram space: with [G; V][G; V]ᵀ = LLᵀ, P[G; V]ᵀ has the law of
ZLᵀ/√m.
Rademacher and SJLT sketches are the library's, the smaller ones by row prefixes and by folding.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import refluence as rf
from benchmarks.gradients import per_example_gradients
from refluence.solvers.sketch_errors import standard_errors
from refluence.zoo import load_benchmark

RATIOS = (1.5, 2.0, 4.0, 8.0)
Z95 = 1.959963984540054
ROWS = 64


@dataclass(frozen=True)
class Exact:
    """Exact scores of k tests with n train examples at every damping.

    Args:
        rows: (n + k, d), train gradients first.
        gram: of the rows, float64.
        n: train examples.
    """

    rows: Tensor
    gram: Tensor
    n: int

    def __post_init__(self) -> None:
        values, vectors = torch.linalg.eigh(self.gram[: self.n, : self.n] / self.n)
        object.__setattr__(self, "spectrum", values.clamp(min=0))
        object.__setattr__(self, "parts", (vectors, vectors.T @ self.gram[: self.n, self.n :]))

    def scores(self, damping: float) -> Tensor:
        """(k, n)."""
        vectors, cross = self.parts  # type: ignore[attr-defined]
        return (vectors @ (cross / (self.spectrum + damping)[:, None])).T  # type: ignore[attr-defined]

    def outside(self) -> Tensor:
        """‖v_⊥‖/‖v‖ of every test, v_⊥ outside the range of the train gradients."""
        values, (_, cross) = self.spectrum, self.parts  # type: ignore[attr-defined]
        kept = values > 1e-10 * values.max()
        inside = (cross[kept].square() / (self.n * values[kept, None])).sum(dim=0)
        norms = self.gram.diagonal()[self.n :]
        return ((norms - inside).clamp(min=0) / norms).sqrt()


def gaussian(exact: Exact, sizes: list[int], seed: int) -> Iterator[tuple[int, Tensor]]:
    """(m, P[G; V]ᵀ as rows) of one Gaussian sketch and its row prefixes."""
    generator = torch.Generator().manual_seed(seed)
    root = _root(exact)
    draws = torch.randn(root.shape[1], max(sizes), generator=generator, dtype=torch.float64)
    wide = root @ draws
    for m in sizes:
        yield m, wide[:, :m] / m**0.5


_roots: dict[int, Tensor] = {}


def _root(exact: Exact) -> Tensor:
    if id(exact) not in _roots:
        values, vectors = torch.linalg.eigh(exact.gram)
        _roots.clear()
        _roots[id(exact)] = vectors * values.clamp(min=0).sqrt()
    return _roots[id(exact)]


def rademacher(exact: Exact, sizes: list[int], seed: int) -> Iterator[tuple[int, Tensor]]:
    """The same of random signs."""
    wide = rf.sketches.Rademacher(max(sizes), seed=seed).project(exact.rows).double() * max(sizes) ** 0.5
    for m in sizes:
        yield m, wide[:, :m] / m**0.5


def sjlt(exact: Exact, sizes: list[int], seed: int) -> Iterator[tuple[int, Tensor]]:
    """The same of CountSketches, folded from their least common multiple."""
    sketch = rf.sketches.SJLT(int(np.lcm.reduce(sizes)), seed=seed)
    wide = sketch.project(exact.rows)
    for m in sizes:
        yield m, sketch.fold(wide, m).double()


KINDS: dict[str, Callable[[Exact, list[int], int], Iterator[tuple[int, Tensor]]]] = {
    "gaussian": gaussian,
    "rademacher": rademacher,
    "sjlt": sjlt,
}


@dataclass(frozen=True)
class Spectral:
    """One sketch's curvature by its eigenvectors, which serve every damping."""

    values: Tensor
    train: Tensor
    tests: Tensor

    @classmethod
    def of(cls, projected: Tensor, n: int) -> Spectral:
        train, tests = projected[:n], projected[n:]
        values, vectors = torch.linalg.eigh(train.T @ train / n)
        return cls(values.clamp(min=0), train @ vectors, tests @ vectors)

    def scores(self, shift: float, scale: float) -> tuple[Tensor, Tensor]:
        """(τ̃, standard errors) with μ = `shift`."""
        train, tests = self.train / (self.values + shift), self.tests / (self.values + shift)
        errors = standard_errors(tests @ train.T, tests.square().sum(1), train.square().sum(1), scale)
        return self.tests @ train.T, errors


def measure(exact: Exact, target: float, m: int, projected: Tensor) -> dict[str, float]:
    """Coverage of one sketch."""
    sketch = Spectral.of(projected, exact.n)
    mu = rf.theory.corrected_damping(sketch.values, m, target)
    wanted = exact.scores(target)
    values, errors = sketch.scores(mu, rf.theory.sketch_variance_scale(sketch.values, m, mu))
    away = (values - wanted) / errors
    plain, plain_errors = sketch.scores(target, rf.theory.sketch_variance_scale(sketch.values, m, target))
    kappa = rf.theory.implied_damping(sketch.values, m, target)
    own = (plain - exact.scores(kappa)) / plain_errors
    naive = (plain - wanted) / sketch.scores(target, target**2 / m)[1]
    return {
        "corrected": _covered(away),
        "spread": float(away.square().mean().sqrt()),
        "plain about its κ": _covered(own),
        "naive": _covered(naive),
        "error": float(errors.norm() / wanted.norm()),
        "kappa": kappa / target,
    }


def _covered(away: Tensor) -> float:
    return float((away.abs() <= Z95).double().mean())


def problem(dataset: str, model: str, n: int, k: int, dimension: float) -> tuple[Exact, float]:
    """Gradients of a trained model of the zoo, and the damping with d_κ = `dimension`."""
    made = load_benchmark(dataset, model, n_train=n, n_test=k)
    network = made.task.model
    parts = [
        per_example_gradients(network, x, y)
        for images, labels in (made.train, made.test)
        for x, y in zip(images.split(ROWS), labels.split(ROWS), strict=True)
    ]
    rows = torch.cat(parts)
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for columns in rows.split(4096, dim=1):
        gram += columns.double() @ columns.double().T
    exact = Exact(rows, gram, n)
    target = rf.theory.damping_for(exact.spectrum, dimension)  # type: ignore[attr-defined]
    outside = exact.outside()
    print(
        f"{dataset} {model}: n = {n}, k = {k}, d = {rows.shape[1]:,}, test accuracy {made.accuracy:.3f}; "
        f"d_κ = {dimension:g} at κ = {target:.3g}; outside the range: median {float(outside.median()):.2f} of a test "
        "gradient's norm",
        flush=True,
    )
    return exact, target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--model", nargs="+", default=["lr", "mlp"])
    parser.add_argument("--sketch", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--sketches", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first sketch")
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--tests", type=int, default=200)
    parser.add_argument("--dimension", type=float, default=60.0, help="d_κ of the damping")
    parser.add_argument("--out", help="write every sketch's numbers to this parquet file")
    arguments = parser.parse_args()
    records = []
    sizes = [round(ratio * arguments.dimension) for ratio in RATIOS]
    for model in arguments.model:
        exact, target = problem(arguments.dataset, model, arguments.train, arguments.tests, arguments.dimension)
        for kind in arguments.sketch:
            begin = time.process_time()
            for seed in range(arguments.seed, arguments.seed + arguments.sketches):
                for m, projected in KINDS[kind](exact, sizes, seed):
                    found = measure(exact, target, m, projected)
                    records.append({"model": model, "sketch": kind, "seed": seed, "m": m, **found})
            frame = pd.DataFrame(records).query("model == @model and sketch == @kind")
            show(frame, arguments.dimension, time.process_time() - begin)
    if arguments.out:
        pd.DataFrame(records).to_parquet(arguments.out, index=False)


def show(frame: pd.DataFrame, dimension: float, seconds: float) -> None:
    """A table of one model and kind of sketch."""
    print(f"\n{frame['sketch'].iloc[0]}, {frame['seed'].nunique()} sketches ({seconds:.0f} s of processor time)\n")
    print("| m/d_κ | corrected | of one sketch, 5 to 95 % | spread | plain about its κ | plain, naive | error | κ/μ |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for m, group in frame.groupby("m"):
        mean = group.mean(numeric_only=True)
        low, high = np.quantile(group["corrected"], [0.05, 0.95])
        print(
            f"| {m / dimension:g} | {mean['corrected']:.3f} | {low:.3f} to {high:.3f} | {mean['spread']:.3f} "
            f"| {mean['plain about its κ']:.3f} | {mean['naive']:.3f} | {mean['error']:.2f} | {mean['kappa']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
