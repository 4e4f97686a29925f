"""The Gram route against a dense float64 solve of (F + λI) on a network small enough for one."""

from __future__ import annotations

import torch

import refluence as rf
from benchmarks import inputs
from benchmarks.gradients import per_example_gradients
from benchmarks.protocol import Job, Measurement, run_worker


def work(job: Job, measurement: Measurement) -> None:
    given = inputs.load_small(job.inputs)
    damping = job.options["damping"]
    with measurement.stage("dense solve"):
        gradients, test = (per_example_gradients(given.model, *rows) for rows in (given.train, given.test))
        curvature = gradients.T @ gradients / len(gradients)
        curvature.diagonal().add_(damping)
        reference = torch.cholesky_solve(test.T, torch.linalg.cholesky(curvature)).T @ gradients.T
    influence = rf.Influence(rf.Task(given.model), solver=rf.solvers.Gram(), damping=damping, progress=False)
    with measurement.stage("Gram route"):
        values = influence.fit(given.train).score(given.test).values
    difference = (values.double() - reference).abs()
    measurement.facts |= {
        "parameters": given.parameters,
        "train": len(gradients),
        "tests": len(test),
        "largest": float(difference.max() / reference.abs().max()),
        "largest_row": float((difference.amax(dim=1) / reference.abs().amax(dim=1)).max()),
        "frobenius": float(difference.norm() / reference.norm()),
    }


if __name__ == "__main__":
    run_worker(work)
