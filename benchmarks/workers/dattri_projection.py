"""dattri: per-example gradients by vmap and `random_project` on the CPU, batch by batch."""

from __future__ import annotations

import torch
from dattri.func.projection import random_project

from benchmarks.gradients import per_example_gradients
from benchmarks.inputs import Inputs
from benchmarks.protocol import Measurement, Options, run_method


def method(given: Inputs, options: Options, measurement: Measurement) -> None:
    m, batch = options["m"], options["batch"]
    projected, norms = [], []
    for images, labels in zip(*(rows.split(batch) for rows in given.train), strict=True):
        with measurement.stage("gradients"):
            gradients = per_example_gradients(given.model, images, labels)
        with measurement.stage("projection"):
            project = random_project(
                gradients, len(gradients), m, proj_max_batch_size=32, proj_seed=0, proj_type=options["kind"]
            )
            projected.append(project(gradients, ensemble_id=0))
        norms.append(gradients.square().sum())
    result = torch.cat(projected)
    measurement.facts["norm_ratio"] = float(result.square().sum() / sum(norms))


if __name__ == "__main__":
    run_method(method)
