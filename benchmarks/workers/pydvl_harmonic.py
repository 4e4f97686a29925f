"""pyDVL: InverseHarmonicMeanInfluence by `influence_factors` of the tests, then `influences_from_factors`.

The documented route that solves once: `influences` on whole data sets applies the operator to the larger side, here
the train rows, and the calculators apply it again for every chunk.
"""

from __future__ import annotations

import warnings

import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.inputs import Inputs
from benchmarks.protocol import Measurement, Options, run_method

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pydvl.influence.torch import InverseHarmonicMeanInfluence


def method(given: Inputs, options: Options, measurement: Measurement) -> Tensor:
    train, _ = given.datasets()
    harmonic = InverseHarmonicMeanInfluence(given.model, F.cross_entropy, regularization=options["damping"])
    with measurement.stage("fit"):
        harmonic = harmonic.fit(DataLoader(train, batch_size=options["batch"]))
    with measurement.stage("score"):
        factors = harmonic.influence_factors(*given.test)
        values = harmonic.influences_from_factors(factors, *given.train)
    return values


if __name__ == "__main__":
    run_method(method)
