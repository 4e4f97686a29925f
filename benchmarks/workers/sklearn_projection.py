"""scikit-learn: per-example gradients by vmap and SparseRandomProjection, batch by batch."""

from __future__ import annotations

import numpy as np
from sklearn.random_projection import SparseRandomProjection

from benchmarks.gradients import per_example_gradients
from benchmarks.inputs import Inputs
from benchmarks.protocol import Measurement, Options, run_method


def method(given: Inputs, options: Options, measurement: Measurement) -> None:
    m, batch = options["m"], options["batch"]
    with measurement.stage("set-up"):
        projection = SparseRandomProjection(n_components=m, dense_output=True, random_state=0)
        projection.fit(np.zeros((1, given.parameters), dtype=np.float32))
    projected, norms = [], []
    for images, labels in zip(*(rows.split(batch) for rows in given.train), strict=True):
        with measurement.stage("gradients"):
            gradients = per_example_gradients(given.model, images, labels).numpy()
        with measurement.stage("projection"):
            projected.append(projection.transform(gradients))
        norms.append(np.square(gradients).sum())
    measurement.facts["norm_ratio"] = float(np.square(np.concatenate(projected)).sum() / sum(norms))


if __name__ == "__main__":
    run_method(method)
