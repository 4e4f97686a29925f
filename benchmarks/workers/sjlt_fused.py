"""Refluence: per-example gradients projected by SJLT as they are made, batch by batch; dense rows are never kept."""

from __future__ import annotations

import torch

import refluence as rf
from benchmarks.inputs import Inputs
from benchmarks.protocol import Measurement, Options, run_method
from refluence.batches import Batches
from refluence.gradients.capture import Capture
from refluence.gradients.rows import GradientRows


def method(given: Inputs, options: Options, measurement: Measurement) -> None:
    task = rf.Task(given.model)
    sketch = rf.sketches.SJLT(options["m"])
    projected = torch.empty(len(given.train[0]), options["m"])
    squared = 0.0
    with measurement.stage("gradients and projection"):
        batches = Batches(given.train)
        groups = {"all": tuple(name for name, _ in given.model.named_parameters())}
        capture = Capture(task, given.model, groups, batches)
        for start, blocks in GradientRows(capture, batches, capture.loss, memory=0, progress=False):
            block = blocks["all"]
            projected[start : start + block.n] = sketch.project(block)
            squared += float(block.squared_norms().sum())
    measurement.facts["norm_ratio"] = float(projected.double().square().sum() / squared)


if __name__ == "__main__":
    run_method(method)
