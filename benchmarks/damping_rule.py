"""Is the automatic damping sane? LDS of exact scores against λ, on models retrained on random halves of the data.

`python -m benchmarks.damping_rule --dataset mnist --model mlp --models 50`

The linear datamodeling score is the mean over test examples of the Spearman correlation, over subsets, between the
summed scores of a subset and the negated loss of the model retrained on it.
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata

import refluence as rf
from refluence.progress import track
from refluence.training import train
from refluence.zoo import Benchmark, build_model, load_benchmark


def ground_truth(dataset: str, model: str, benchmark: Benchmark, models: int) -> tuple[np.ndarray, np.ndarray]:
    """Subset masks (models, n) and test losses of the retrained models (models, k)."""
    inputs, labels = benchmark.train
    masks = np.zeros((models, len(labels)), dtype=bool)
    losses = []
    for s in track(range(models), "retraining on halves"):
        rows = np.random.default_rng(s).choice(len(labels), len(labels) // 2, replace=False)
        masks[s, rows] = True
        subset = (inputs[rows], labels[rows])
        retrained = train(
            benchmark.task,
            subset,
            benchmark.recipe,
            build=partial(build_model, dataset, model),
            seed=1000 + s,
            progress=False,
        )
        with torch.no_grad():
            losses.append(F.cross_entropy(retrained(benchmark.test[0]), benchmark.test[1], reduction="none").numpy())
    return masks, np.stack(losses)


def lds(scores: np.ndarray, masks: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    """Mean over tests of the Spearman correlation, and its standard error over tests."""
    predicted = rankdata(masks.astype(float) @ scores.T, axis=0)
    measured = rankdata(-losses, axis=0)
    predicted -= predicted.mean(axis=0)
    measured -= measured.mean(axis=0)
    norms = np.sqrt((predicted**2).sum(axis=0) * (measured**2).sum(axis=0))
    correlations = (predicted * measured).sum(axis=0) / np.where(norms > 0, norms, np.inf)
    return float(correlations.mean()), float(correlations.std(ddof=1) / np.sqrt(len(correlations)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--epochs", type=int, help="train for so many epochs instead of the published number")
    arguments = parser.parse_args()
    benchmark = load_benchmark(arguments.dataset, arguments.model, epochs=arguments.epochs)
    masks, losses = ground_truth(arguments.dataset, arguments.model, benchmark, arguments.models)
    influence = rf.Influence(benchmark.task, solver=rf.solvers.Gram()).fit(benchmark.train)
    automatic = float(influence.damping)
    grid = sorted([automatic, *(10.0**e for e in range(-8, 2))])
    print(f"{arguments.dataset} {arguments.model}: test accuracy {benchmark.accuracy:.3f}, {arguments.models} halves")
    print("| λ | d_λ | LDS | ± |\n| --- | --- | --- | --- |")
    for damping in grid:
        fitted = influence.at(damping)
        value, error = lds(fitted.score(benchmark.test).values.numpy(), masks, losses)
        name = f"**{damping:.2g} (auto)**" if damping == automatic else f"{damping:.0e}"
        print(f"| {name} | {fitted.effective_dimension:.1f} | {value:.3f} | {error:.3f} |", flush=True)


if __name__ == "__main__":
    main()
