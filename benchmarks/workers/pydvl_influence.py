"""pyDVL: `influence_factors` of the tests, then `influences_from_factors` with the train rows.

The documented route that solves once: `influences` on whole data sets applies the operator to the larger side, here
the train rows, and the calculators apply it again for every chunk.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.inputs import Inputs
from benchmarks.protocol import Measurement, Options, run_method
from benchmarks.residual import CHECKED, relative_residual

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pydvl.influence import torch as pydvl_torch
    from pydvl.influence.torch import SecondOrderMode

HAS_MODE = ("CgInfluence", "LissaInfluence", "ArnoldiInfluence", "NystroemSketchInfluence")


def build(given: Inputs, options: Options) -> Any:
    """The model of pyDVL that the options name."""
    kind = getattr(pydvl_torch, options["method"])
    settings = dict(options["settings"])
    if options["method"] == "EkfacInfluence":
        return kind(given.model, hessian_regularization=options["damping"], **settings)
    if options["method"] in HAS_MODE:
        fisher = options["curvature"] == "fisher"
        settings["second_order_mode"] = SecondOrderMode.GAUSS_NEWTON if fisher else SecondOrderMode.HESSIAN
    return kind(given.model, F.cross_entropy, regularization=options["damping"], **settings)


def method(given: Inputs, options: Options, measurement: Measurement) -> Tensor:
    train, _ = given.datasets()
    tests = tuple(rows[: options.get("tests")] for rows in given.test)
    torch.manual_seed(0)
    influence = build(given, options)
    with measurement.stage("fit"):
        influence = influence.fit(DataLoader(train, batch_size=options["batch"]))
    with measurement.stage("solve"):
        factors = influence.influence_factors(*tests)
    with measurement.stage("train side"):
        values = influence.influences_from_factors(factors, *given.train)
    if options["method"] in ("CgInfluence", "LissaInfluence"):
        rows = slice(None, CHECKED)
        found = relative_residual(
            given, factors[rows].detach(), tuple(part[rows] for part in tests), options["curvature"], options["damping"]
        )
        measurement.facts["residual"] = found
    return values


if __name__ == "__main__":
    run_method(method)
