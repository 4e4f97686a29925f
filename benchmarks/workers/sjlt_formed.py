"""Refluence's SJLT of gradients that lie in memory as a matrix, next to copying that matrix, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import refluence as rf
from benchmarks.gradients import per_example_gradients
from benchmarks.inputs import Inputs
from benchmarks.protocol import Measurement, Options, run_method

REPETITIONS = 5


def seconds_of(action: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def method(given: Inputs, options: Options, measurement: Measurement) -> None:
    n = len(given.train[0])
    formed, target = torch.empty(n, given.parameters), torch.empty(n, given.parameters)
    for rows in torch.arange(n).split(500):
        formed[rows] = per_example_gradients(given.model, given.train[0][rows], given.train[1][rows])
    sketch = rf.sketches.SJLT(options["m"])
    measurement.facts["first call"] = seconds_of(lambda: sketch.project(formed))
    actions: dict[str, Callable[[], Tensor]] = {
        "projection": lambda: sketch.project(formed),
        "clone": formed.clone,
        "copy": lambda: target.copy_(formed),
    }
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(REPETITIONS):
        for name, action in actions.items():
            seconds[name].append(seconds_of(action))
    # the copies are the yardstick, not stages of the work
    measurement.stages["projection"] = statistics.median(seconds["projection"])
    measurement.facts |= {name: statistics.median(seconds[name]) for name in ("clone", "copy")}
    measurement.facts["norm_ratio"] = float(sketch.project(formed).square().sum() / formed.square().sum())


if __name__ == "__main__":
    run_method(method)
