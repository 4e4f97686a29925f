"""Refluence: per-example gradients of every layer projected by their factors as they are made; no row is formed."""

from __future__ import annotations

import torch

import refluence as rf
from benchmarks.inputs import Inputs
from benchmarks.protocol import Measurement, Options, run_method
from refluence.batches import Batches
from refluence.gradients.capture import Capture
from refluence.gradients.groups import parameter_groups
from refluence.gradients.rows import GradientRows


def method(given: Inputs, options: Options, measurement: Measurement) -> None:
    task = rf.Task(given.model)
    [(name, arguments)] = options["sketch"].items()
    sketch = getattr(rf.sketches, name)(**arguments)
    total = 0.0
    with measurement.stage("gradients and projection"):
        batches = Batches(given.train)
        groups = parameter_groups(given.model, task.parameter_names(), "module")
        capture = Capture(task, given.model, groups, batches)
        projected = {group: torch.empty(len(given.train[0]), sketch.m) for group in groups}
        for start, blocks in GradientRows(capture, batches, capture.loss, memory=0, progress=False):
            for group, block in blocks.items():
                projected[group][start : start + block.n] = sketch.project(block)
                total += float(block.squared_norms().sum())
    squared = sum(float(rows.double().square().sum()) for rows in projected.values())
    measurement.facts["norm_ratio"] = squared / total


if __name__ == "__main__":
    run_method(method)
