"""What a worker and the runner say to each other: a worker measures one case and writes one JSON file.

A fresh process for every measurement keeps thread pools, allocator pools and memory peaks of one library out of the
next one's figures.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks import inputs
from benchmarks.inputs import Inputs

Options = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a worker is told to do."""

    inputs: Path
    scores: Path
    options: Options


@dataclass
class Measurement:
    """What a worker found: seconds of each stage, in order, and whatever else it noted.

    Attributes:
        stages: seconds by stage; what the report adds up.
        facts: other numbers and short texts, by name.
        baseline_mb: resident memory when the imports and the inputs were loaded and the work began.
        peak_mb: the most memory that the process held until the end of its last stage.
    """

    stages: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    baseline_mb: float = 0.0
    peak_mb: float = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; the same name twice adds up."""
        if not self.stages:
            self.baseline_mb = resident_mb("VmRSS")
        start = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start
        self.peak_mb = resident_mb("VmHWM")


Method = Callable[[Inputs, Options, Measurement], Tensor | None]


def resident_mb(field_name: str) -> float:
    """A line of /proc/self/status in MB: VmRSS is the memory held now, VmHWM its peak since this program started.

    Not `ru_maxrss`, which a new process inherits from the one that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def run_worker(work: Callable[[Job, Measurement], None]) -> None:
    """The main function of a worker; a failure becomes a result that says how it failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--options", type=json.loads, default={})
    given = parser.parse_args()
    measurement = Measurement()
    result: dict[str, Any] = {}
    try:
        work(Job(given.inputs, given.scores, given.options), measurement)
    except Exception as error:
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    result |= {
        "stages": measurement.stages,
        "facts": measurement.facts,
        "baseline_mb": measurement.baseline_mb,
        "peak_mb": measurement.peak_mb or resident_mb("VmHWM"),
    }
    given.result.write_text(json.dumps(result))


def run_method(method: Method) -> None:
    """The main function of a worker that measures a method: a warm-up on a few rows first, then the method itself.

    The warm-up keeps the first-use costs of a library (imports made late, thread pools) out of its time. Its sketch has
    another size, so that nothing drawn for it can serve the measured one. `warm_up` among the options replaces others
    there, for methods whose cost does not fall with the rows.
    """

    def work(job: Job, measurement: Measurement) -> None:
        given = inputs.load(job.inputs)
        small = {"m": 8} if "m" in job.options else job.options.get("warm_up", {})
        method(given.first(16, 4), job.options | small, Measurement())
        scores = method(given, job.options, measurement)
        if scores is not None:
            np.save(job.scores, scores.detach().double().numpy())

    run_worker(work)
