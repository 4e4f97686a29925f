"""How useful is each method? LDS of its scores on the same models retrained on random halves of the data.

`python -m benchmarks.usefulness --dataset mnist --model mlp --epochs 10 --models 50`
"""

from __future__ import annotations

import argparse
import time

import refluence as rf
from benchmarks.damping_rule import ground_truth, lds, trained_for
from refluence.zoo.training import evaluate

EKFAC = rf.solvers.Ekfac()
METHODS = [
    ("ggn", rf.solvers.ConjugateGradient(rtol=1e-3)),
    ("mc_fisher", rf.solvers.Gram()),
    ("fisher", rf.solvers.Gram()),
    ("ggn", rf.solvers.Arnoldi(64)),
    ("ggn", rf.solvers.Arnoldi(64, complement=False)),
    ("ggn", rf.solvers.Nystroem(64)),
    ("ggn", rf.solvers.Nystroem(512)),
    ("mc_fisher", EKFAC),
    ("mc_fisher", rf.solvers.Kfac()),
    ("fisher", EKFAC),
    ("fisher", rf.solvers.Sketched(rf.sketches.SJLT(2048))),
    ("ggn", rf.solvers.Sketched(rf.sketches.SJLT(2048))),
    ("fisher", rf.solvers.HarmonicMean()),
    ("fisher", rf.solvers.Identity()),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--tests", type=int, default=500)
    parser.add_argument("--damping", type=float, nargs="+", default=[1e-3, 1e-2, 1e-1])
    parser.add_argument("--epochs", type=int, help="train for so many epochs instead of the published number")
    arguments = parser.parse_args()
    benchmark = trained_for(arguments.dataset, arguments.model, arguments.epochs)
    test = tuple(part[: arguments.tests] for part in benchmark.test)
    masks, losses = ground_truth(arguments.dataset, arguments.model, benchmark, arguments.models)
    losses = losses[:, : arguments.tests]
    accuracy = evaluate(benchmark.task.model, benchmark.test).accuracy
    print(f"{arguments.dataset} {arguments.model}: test accuracy {accuracy:.3f}, {arguments.models} halves")
    print("| curvature | solver | " + " | ".join(f"λ = {value:g}" for value in arguments.damping) + " | ± | s |")
    print("| --- | --- | " + " | ".join("---" for _ in arguments.damping) + " | --- | --- |")
    for curvature, solver in METHODS:
        begin = time.perf_counter()
        influence = rf.Influence(
            benchmark.task, curvature=curvature, solver=solver, damping=arguments.damping[0], progress=False
        ).fit(benchmark.train)
        found = [lds(influence.at(damping).score(test).values.numpy(), masks, losses) for damping in arguments.damping]
        seconds = time.perf_counter() - begin
        cells = " | ".join(f"{value:.3f}" for value, _ in found)
        print(f"| {curvature} | {influence.plan.solver} | {cells} | {found[0][1]:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
