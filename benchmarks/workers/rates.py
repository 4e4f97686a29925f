"""What this machine can do: the rate of matrix products and the bandwidth of copies, measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.protocol import Job, Measurement, run_worker


def best(action: Callable[[], object], repetitions: int = 5) -> float:
    """Seconds of the fastest repetition after one that is not counted."""
    action()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def work(job: Job, measurement: Measurement) -> None:
    size, numbers = job.options["size"], job.options["numbers"]
    with measurement.stage("measure"):
        for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
            a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
            out = torch.empty_like(a)
            measurement.facts[f"gflops_{name}"] = (
                2 * size**3 / best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) / 1e9
            )
        source = torch.randn(numbers)
        target = torch.empty_like(source)
        # a copy reads and writes every byte
        measurement.facts["copy_gb_per_s"] = 2 * 4 * numbers / best(lambda: target.copy_(source)) / 1e9
    measurement.facts["threads"] = torch.get_num_threads()


if __name__ == "__main__":
    run_worker(work)
