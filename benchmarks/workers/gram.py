"""Refluence, exact scores by the n × n Gram of the gradients (empirical Fisher, float64 solves)."""

from __future__ import annotations

from torch import Tensor

import refluence as rf
from benchmarks.inputs import Inputs
from benchmarks.protocol import Measurement, Options, run_method


def method(given: Inputs, options: Options, measurement: Measurement) -> Tensor:
    task = rf.Task(given.model)
    influence = rf.Influence(task, solver=rf.solvers.Gram(), damping=options["damping"], progress=False)
    with measurement.stage("fit"):
        influence.fit(given.train)
    with measurement.stage("score"):
        values = influence.score(given.test).values
    measurement.facts["effective_dimension"] = float(influence.effective_dimension)
    return values


if __name__ == "__main__":
    run_method(method)
