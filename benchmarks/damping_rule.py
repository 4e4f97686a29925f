"""Is the automatic damping sane? LDS of exact scores against λ, on models retrained on random halves of the data.

`python -m benchmarks.damping_rule --dataset mnist --model mlp --models 50`
"""

from __future__ import annotations

import argparse
import dataclasses

import refluence as rf
from refluence.zoo import load_benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--epochs", type=int, help="train for so many epochs instead of the published number")
    arguments = parser.parse_args()
    benchmark = load_benchmark(arguments.dataset, arguments.model, epochs=arguments.epochs)
    train, test = benchmark.train, benchmark.test
    truth = rf.evaluation.retrain(benchmark.task, train, test, arguments.models, benchmark.recipe)
    # The loss is a falling function of the margin, so both have the same ranks; the margin's gradient does not vanish
    # in float32 where a test is classified with certainty.
    task = dataclasses.replace(benchmark.task, measurement="margin")
    influence = rf.Influence(task, solver=rf.solvers.Gram()).fit(train)
    automatic = float(influence.damping)  # type: ignore[arg-type]
    grid = sorted([automatic, *(10.0**e for e in range(-8, 2))])
    print(f"{arguments.dataset} {arguments.model}: test accuracy {benchmark.accuracy:.3f}, {arguments.models} halves")
    print("| λ | d_λ | LDS | 95 % interval |\n| --- | --- | --- | --- |")
    for damping in grid:
        fitted = influence.at(damping)
        found = rf.evaluation.lds(fitted.score(test), truth)
        name = f"**{damping:.2g} (auto)**" if damping == automatic else f"{damping:.0e}"
        interval = f"{found.low:.3f} to {found.high:.3f}"
        print(f"| {name} | {fitted.effective_dimension:.1f} | {found.value:.3f} | {interval} |", flush=True)


if __name__ == "__main__":
    main()
