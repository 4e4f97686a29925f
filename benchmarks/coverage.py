"""Do the error bars of sketched scores cover? Shares of all pairs whose 95 % interval holds the exact score.

`python -m benchmarks.coverage --dataset mnist --model lr mlp --sketches 200`

For every size m and kind of sketch, over independent sketches: the corrected scores with their standard errors, the
plain ones about the damping κ that they estimate, and the plain ones about the damping that is on them with the error
that one would give without knowing that a sketch adds damping (κ = μ, κ' = 1). All that an interval is made of is from
its sketch; the exact scores are from the Gram matrix. Tests are test images, whose gradients lie partly outside the
range of the curvature. Sketches, scores and errors are those of `refluence study certificate`.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
from torch import Tensor

from refluence.studies.projection.certificate import CertificateStudy
from refluence.studies.projection.grid import Sketching
from refluence.studies.projection.problem import Problem, ProblemOptions
from refluence.studies.projection.sketched_scores import SketchedScores
from refluence.studies.projection.spectral import Spectral
from refluence.studies.projection.study import make_source
from refluence.studies.projection.system import SketchedSystem
from refluence.theory import corrected_damping, damping_for, implied_damping, sketch_variance_scale

Z95 = 1.959963984540054
KINDS = {"gaussian": "normal", "rademacher": "rademacher", "sjlt": "sjlt"}


def measure(spectral: Spectral, target: float, system: SketchedSystem) -> dict[str, float]:
    """Coverage of one sketch."""
    sketch, m = SketchedScores.of(system), system.size
    mu = corrected_damping(sketch.values, m, target)
    wanted = spectral.scores(target).T
    values, errors = sketch.at(mu, sketch_variance_scale(sketch.values, m, mu))
    away = (values - wanted) / errors
    plain, plain_errors = sketch.at(target, sketch_variance_scale(sketch.values, m, target))
    kappa = implied_damping(sketch.values, m, target)
    own = (plain - spectral.scores(kappa).T) / plain_errors
    naive = (plain - wanted) / sketch.at(target, target**2 / m)[1]
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


def prepare(options: ProblemOptions, dimension: float) -> tuple[Problem, Spectral, float]:
    """A trained model of the zoo, the spectrum of its gradients, and the damping with d_κ = `dimension`."""
    problem = Problem(options, progress=False)
    facts = problem.facts()
    spectral = Spectral.of_gram(problem.gram(), facts["n"])
    target = damping_for(spectral.eigenvalues, dimension)
    outside = spectral.kernel_norms() / spectral.test_norms()
    print(
        f"{options.dataset} {options.model}: n = {facts['n']}, k = {facts['tests']}, d = {facts['parameters']:,}, test "
        f"accuracy {facts['test_accuracy']:.3f}; d_κ = {dimension:g} at κ = {target:.3g}; outside the range: median "
        f"{float(outside.median()):.2f} of a test gradient's norm",
        flush=True,
    )
    return problem, spectral, target


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
    for model in arguments.model:
        options = ProblemOptions(arguments.dataset, model, arguments.train, arguments.tests, arguments.tests)
        problem, spectral, target = prepare(options, arguments.dimension)
        sizes = CertificateStudy(dimension=arguments.dimension).sizes(spectral.rank)
        for kind in arguments.sketch:
            begin = time.process_time()
            source = make_source(problem, spectral, Sketching(KINDS[kind]), None)
            for seed in range(arguments.seed, arguments.seed + arguments.sketches):
                for system in source.systems(seed, sizes, set(sizes)):
                    found = measure(spectral, target, system)
                    records.append({"model": model, "sketch": kind, "seed": seed, "m": system.size, **found})
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
