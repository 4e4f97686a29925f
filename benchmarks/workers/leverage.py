"""Leverage scores beside forming XᵀX and the singular value decomposition, in one process."""

from __future__ import annotations

from benchmarks import leverage
from benchmarks.protocol import Job, Measurement, run_worker


def work(job: Job, measurement: Measurement) -> None:
    with measurement.stage("measure"):
        measurement.facts |= leverage.measure(job.options["quick"])


if __name__ == "__main__":
    run_worker(work)
