"""Refluence through its public interface: one curvature, one solver, fit and scores."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

import refluence as rf
from benchmarks.inputs import Inputs
from benchmarks.protocol import Measurement, Options, run_method


def named(value: Any) -> Any:
    """{"Name": {argument: value}} as the object `rf.solvers.Name(argument=value)`; anything else as it is."""
    if not isinstance(value, dict):
        return value
    [(name, arguments)] = value.items()
    return operator.attrgetter(name)(rf.solvers)(**{key: named(given) for key, given in arguments.items()})


def method(given: Inputs, options: Options, measurement: Measurement) -> Tensor:
    images, labels = (rows[: options.get("tests")] for rows in given.test)
    influence = rf.Influence(
        rf.Task(given.model),
        curvature=options["curvature"],
        solver=named(options["solver"]),
        damping=options["damping"],
        progress=False,
    )
    with measurement.stage("fit"):
        influence.fit(given.train)
    with measurement.stage("score"):
        scores = influence.score((images, labels))
    if options.get("dimension"):
        measurement.facts["effective_dimension"] = float(influence.effective_dimension)
    measurement.facts |= reported(influence.diagnostics)
    if isinstance(steps := influence.diagnostics.get("iterations"), list):
        measurement.facts["column steps"] = sum(steps)
    if scores.error is not None:
        measurement.facts["standard error"] = float(scores.error.norm() / scores.values.norm())
    return scores.values


def reported(diagnostics: dict[str, Any]) -> dict[str, Any]:
    """What the solver says of itself; of a number for each column the largest, of one for each block their sum."""
    facts = {}
    for name, value in diagnostics.items():
        if isinstance(value, (bool, int, float, str)):
            facts[name] = value
        elif isinstance(value, list) and value and not isinstance(value[0], str):
            facts[name] = max(value)
        elif isinstance(value, list):
            facts[name] = len(value)
        elif isinstance(value, dict):
            facts[name] = sum(value.values())
    return facts


if __name__ == "__main__":
    run_method(method)
