"""Refluence, scores by the sketched route: gradients to m numbers by SJLT, an m × m curvature."""

from __future__ import annotations

from torch import Tensor

import refluence as rf
from benchmarks.inputs import Inputs
from benchmarks.protocol import Measurement, Options, run_method


def method(given: Inputs, options: Options, measurement: Measurement) -> Tensor:
    solver = rf.solvers.Sketched(rf.sketches.SJLT(options["m"]), corrected=options["corrected"])
    influence = rf.Influence(rf.Task(given.model), solver=solver, damping=options["damping"], progress=False)
    with measurement.stage("fit"):
        influence.fit(given.train)
    with measurement.stage("score"):
        # The peers have no error bars: the same work is compared.
        values = influence.score(given.test, errors=False).values
    return values


if __name__ == "__main__":
    run_method(method)
