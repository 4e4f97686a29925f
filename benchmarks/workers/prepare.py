"""Train the network (or take it from the zoo's cache) and save it with the rows that this run uses."""

from __future__ import annotations

import torch

from benchmarks.inputs import mlp
from benchmarks.protocol import Job, Measurement, run_worker
from refluence.zoo import load_benchmark


def work(job: Job, measurement: Measurement) -> None:
    with measurement.stage("train"):
        benchmark = load_benchmark("mnist", "mlp", progress=False)
    model = mlp()
    model.load_state_dict(benchmark.task.model.state_dict())
    n_train, n_test = job.options["n_train"], job.options["n_test"]
    (x, y), (x_test, y_test) = benchmark.train, benchmark.test
    saved = {
        "model": model.state_dict(),
        "train": [x[:n_train].clone(), y[:n_train].clone()],
        "test": [x_test[:n_test].clone(), y_test[:n_test].clone()],
    }
    torch.save(saved, job.inputs / "inputs.pt")
    measurement.facts |= {"accuracy": benchmark.accuracy, "description": benchmark.description}


if __name__ == "__main__":
    run_worker(work)
