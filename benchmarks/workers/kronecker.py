"""Refluence, scores from Kronecker sketches of every layer: fit and score through the public interface."""

from __future__ import annotations

from torch import Tensor

import refluence as rf
from benchmarks.inputs import Inputs
from benchmarks.protocol import Measurement, Options, run_method


def method(given: Inputs, options: Options, measurement: Measurement) -> Tensor:
    solver = rf.solvers.Sketched(rf.sketches.Kronecker(options["m_a"], options["m_e"]), corrected=options["corrected"])
    influence = rf.Influence(
        rf.Task(given.model), solver=solver, damping=options["damping"], blocks="module", progress=False
    )
    with measurement.stage("fit"):
        influence.fit(given.train)
    with measurement.stage("score"):
        values = influence.score(given.test).values
    return values


if __name__ == "__main__":
    run_method(method)
