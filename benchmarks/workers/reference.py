"""The exact damped scores that everything is compared with: kept beside the inputs, made again when these change.

All of it in float64. Under the generalised Gauss-Newton (C + λI)⁻¹g_test by conjugate gradients to 1e-6, checked by
products that use nothing of the library, and multiplied with gradients that are not the library's; under the empirical
Fisher by the Gram route, which the small network's dense solve checks.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import refluence as rf
from benchmarks import inputs
from benchmarks.gradients import per_example_gradients
from benchmarks.inputs import Inputs
from benchmarks.protocol import Job, Measurement, run_worker
from benchmarks.residual import CHECKED, relative_residual

TOLERANCE = 1e-6
SURE = 1e-5  # 1 - p of the label, of which float32 keeps two digits
DOUBLE = {"dtype": torch.float64, "progress": False}


def key(given: Inputs, damping: float) -> str:
    """The same for the same model, rows, damping and way of computing."""
    digest = hashlib.sha256(repr(damping).encode() + Path(__file__).read_bytes())
    for tensor in (*given.model.state_dict().values(), *given.train, *given.test):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def ggn_scores(given: Inputs, damping: float, measurement: Measurement) -> np.ndarray:
    """(tests, train) in float64."""
    solver = rf.solvers.ConjugateGradient(rtol=TOLERANCE)
    influence = rf.Influence(rf.Task(given.model), curvature="ggn", solver=solver, damping=damping, **DOUBLE)
    with measurement.stage("conjugate gradients"):
        solutions = influence.fit(given.train).inverse_hvp(given.test)
    checked = tuple(rows[:CHECKED] for rows in given.test)
    measurement.facts["residual"] = relative_residual(given, solutions[:CHECKED], checked, "ggn", damping)
    model = given.model.double()
    with measurement.stage("scores"):
        parts: list[Tensor] = [
            solutions @ per_example_gradients(model, images.double(), labels).T
            for images, labels in zip(*(rows.split(500) for rows in given.train), strict=True)
        ]
    return torch.cat(parts, dim=1).numpy()


def fisher_scores(given: Inputs, damping: float, measurement: Measurement) -> np.ndarray:
    """(tests, train) in float64."""
    influence = rf.Influence(rf.Task(given.model), solver=rf.solvers.Gram(), damping=damping, **DOUBLE)
    with measurement.stage("Gram"):
        values = influence.fit(given.train).score(given.test).values
    return values.numpy()


def unsure_tests(given: Inputs) -> np.ndarray:
    """(tests,): whether the probability of the label is far enough from 1 for float32 to know the gradient."""
    images, labels = given.test
    with torch.no_grad():
        log_p = given.model.double()(images.double()).log_softmax(dim=1)
    left = -torch.expm1(log_p[torch.arange(len(labels)), labels])
    return (left >= SURE).numpy()


def work(job: Job, measurement: Measurement) -> None:
    given, damping = inputs.load(job.inputs), job.options["damping"]
    paths = {name: Path(path) for name, path in job.options["scores"].items()}
    stamp = job.inputs / "reference.json"
    wanted = key(given, damping)
    known = json.loads(stamp.read_text()) if stamp.exists() else {}
    if known.get("key") == wanted and all(path.exists() for path in paths.values()):
        measurement.facts |= known["facts"] | {"kept": True}
        return
    unsure = unsure_tests(copy.deepcopy(given))
    measurement.facts["unsure"] = int(unsure.sum())
    np.save(paths["unsure"], unsure)
    np.save(paths["fisher"], fisher_scores(given, damping, measurement))
    np.save(paths["ggn"], ggn_scores(given, damping, measurement))
    stamp.write_text(json.dumps({"key": wanted, "facts": measurement.facts}))


if __name__ == "__main__":
    run_worker(work)
