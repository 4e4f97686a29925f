"""Retraining on random halves: together, against a plain loop of single trainings in the same run.

`OMP_NUM_THREADS=2 python -m benchmarks.retraining --dataset mnist --model mlp --models 100`

The loop is PyTorch's own as one writes it, with the fused optimiser, on whichever number of threads a short trial of it
found quicker. `--loop K` trains K models in the loop, spread over the run, and scales their time to all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import refluence as rf
from benchmarks.machine import describe
from refluence.evaluation.retraining import retrain
from refluence.evaluation.subsets import random_subsets
from refluence.zoo import build_model, load_dataset
from refluence.zoo.recipes import recipe_for


def plain_loop(build: Any, inputs: torch.Tensor, labels: torch.Tensor, recipe: Any, seed: int) -> float:
    """Seconds for one model by an ordinary training loop."""
    begin = time.perf_counter()
    torch.manual_seed(seed)
    model = build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, fused=True)
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(labels)).split(recipe.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    return time.perf_counter() - begin


def quicker_threads(
    build: Any, inputs: torch.Tensor, labels: torch.Tensor, recipe: Any
) -> tuple[int, dict[int, float]]:
    """The number of threads, one or all, on which two epochs of the loop are quicker, and the seconds of each."""
    short = dataclasses.replace(recipe, epochs=2)
    everything = torch.get_num_threads()
    seconds: dict[int, float] = {}
    for threads in sorted({1, everything}):
        torch.set_num_threads(threads)
        seconds[threads] = min(plain_loop(build, inputs, labels, short, 0) for _ in range(3))
    torch.set_num_threads(everything)
    return min(seconds, key=lambda threads: seconds[threads]), seconds


def operations(build: Any, inputs: torch.Tensor, labels: torch.Tensor, recipe: Any) -> tuple[float, float]:
    """Multiply-adds times two of one training, with the gradient of the inputs and without it."""
    model, batch = build(), slice(0, recipe.batch_size)
    counts = []
    for needed in (True, False):
        with FlopCounterMode(display=False) as counter:
            F.cross_entropy(model(inputs[batch].clone().requires_grad_(needed)), labels[batch]).backward()
        counts.append(counter.get_total_flops() / recipe.batch_size * len(labels) * recipe.epochs)
    return counts[0], counts[1]


def matrix_rate() -> float:
    """The best float32 rate of a large matrix product here, in operations a second."""
    size = 2048
    matrix = torch.randn(size, size)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--epochs", type=int, help="instead of the published number")
    parser.add_argument("--loop", type=int, help="models trained in the loop; default: all")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    split = load_dataset(arguments.dataset)
    recipe = recipe_for(arguments.dataset, arguments.model)
    if arguments.epochs:
        recipe = dataclasses.replace(recipe, epochs=arguments.epochs)

    def build() -> torch.nn.Module:
        return build_model(arguments.dataset, arguments.model)

    masks = random_subsets(len(split.train[1]), arguments.models)
    halves = [tuple(column[mask] for column in split.train) for mask in masks]
    threads, trial = quicker_threads(build, *halves[0], recipe)
    with_inputs, without = operations(build, *halves[0], recipe)
    looped = arguments.loop or arguments.models
    everything = torch.get_num_threads()

    def loop(models: range) -> list[float]:
        torch.set_num_threads(threads)
        seconds = [plain_loop(build, *halves[i], recipe, i) for i in models]
        torch.set_num_threads(everything)
        return seconds

    rate = matrix_rate()
    singles = loop(range(looped // 2))
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        truth = retrain(rf.Task(build()), split.train, split.test, masks, recipe, build=build, path=folder)
        together = time.perf_counter() - begin
    singles += loop(range(looped // 2, looped))
    rate = max(rate, matrix_rate())
    alone = statistics.mean(singles) * arguments.models
    found = {
        "machine": describe(),
        "models": arguments.models,
        "looped": looped,
        "training": truth.manifest["training"],
        "recipe": recipe.describe(),
        "loop_threads": threads,
        "loop_trial_seconds": trial,
        "loop_seconds": round(alone, 2),
        "together_seconds": round(together, 2),
        "ratio": round(alone / together, 2),
        "tflop_with_input_gradients": round(with_inputs * arguments.models / 1e12, 3),
        "tflop_done": round(without * arguments.models / 1e12, 3),
        "gflops_together": round(without * arguments.models / together / 1e9, 1),
        "gflops_loop": round(without * arguments.models / alone / 1e9, 1),
        "matrix_gflops": round(rate / 1e9, 1),
        "share_of_matrix_rate": round(without * arguments.models / together / rate, 3),
        "mean_loss": truth.values().mean().item(),
    }
    print(json.dumps(found, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
