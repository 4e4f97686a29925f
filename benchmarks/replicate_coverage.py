"""Do the error bars of averaged sketches cover? Shares of all pairs whose 95 % interval holds the exact score.

`python -m benchmarks.replicate_coverage --dataset mnist --model lr mlp`

For `Sketched(sketch, replicates=R)`, whose errors come from the spread of R independent sketches, as those of Kronecker
and tensor sketches must: through the public interface, against exact scores of the same fit's gradients by `Gram`, for
several seeds. Every layer is a block of its own, at the damping with d_κ = `--dimension` over all layers.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd

import refluence as rf
from refluence.zoo import load_benchmark

SKETCHES = {
    "Kronecker(32, 32)": lambda seed: rf.sketches.Kronecker(32, 32, seed=seed),
    "Kronecker(64, 64)": lambda seed: rf.sketches.Kronecker(64, 64, seed=seed),
    "TensorSketch(1024)": lambda seed: rf.sketches.TensorSketch(1024, seed=seed),
    "SJLT(1024)": lambda seed: rf.sketches.SJLT(1024, seed=seed),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--model", nargs="+", default=["lr", "mlp"])
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--tests", type=int, default=200)
    parser.add_argument("--dimension", type=float, default=60.0)
    parser.add_argument("--replicates", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="write every fit's numbers to this parquet file")
    arguments = parser.parse_args()
    records = []
    for model in arguments.model:
        benchmark = load_benchmark(arguments.dataset, model, n_train=arguments.train, n_test=arguments.tests)
        task, train, test = benchmark.task, benchmark.train, benchmark.test
        options = {"damping": rf.EffectiveDimension(arguments.dimension), "blocks": "module", "progress": False}
        exact = rf.Influence(task, solver=rf.solvers.Gram(), **options).fit(train)
        damping, wanted = exact.damping, exact.score(test).values.double()
        for name, make in SKETCHES.items():
            for replicates in arguments.replicates:
                begin = time.process_time()
                for seed in range(arguments.seeds):
                    solver = rf.solvers.Sketched(make(seed * 1000), replicates=replicates)
                    scores = rf.Influence(task, solver=solver, **{**options, "damping": damping}).fit(train).score(test)
                    values = scores.values.double()
                    away = (values - wanted) / scores.error
                    known = scores.error > 0
                    records.append(
                        {
                            "model": model,
                            "sketch": name,
                            "replicates": replicates,
                            "seed": seed,
                            "covered": float((away[known].abs() <= 1.959963984540054).double().mean()),
                            "error": float((values - wanted).norm() / wanted.norm()),
                            "slope": float((values * wanted).sum() / wanted.square().sum()),
                        }
                    )
                rows = pd.DataFrame(records[-arguments.seeds :])
                low, high = np.quantile(rows["covered"], [0.05, 0.95])
                print(
                    f"| {model} | {name} | {replicates} | {rows['covered'].mean():.3f} | {low:.3f} to {high:.3f} "
                    f"| {rows['error'].mean():.2f} | {rows['slope'].mean():.3f} | {time.process_time() - begin:.0f} |",
                    flush=True,
                )
    if arguments.out:
        pd.DataFrame(records).to_parquet(arguments.out, index=False)


if __name__ == "__main__":
    main()
