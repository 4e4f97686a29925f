"""What a store of gradients costs and spares: fits of one model without a store, with a new one and with a full one.

    python -m benchmarks.stores [--dataset mnist] [--model mlp] [--train 5000] [--tests 100] [--m 4096]

CPU seconds are those of the process (`time.process_time`), on one thread; bytes are those of the shards. The rounding
error of a score is ‖τ − τ̂‖/‖τ‖ over all pairs at the same damping, τ̂ of a store of fewer bytes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import refluence as rf
from refluence.store import describe
from refluence.store.places import open_place
from refluence.zoo import load_benchmark

DAMPINGS = (1e-2, 1e-4, 3.5e-6)


def main() -> None:
    """Run and print one JSON object a fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--model", default="mlp")
    for name, value in (("train", 5000), ("tests", 100), ("m", 4096)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    benchmark = load_benchmark(options.dataset, options.model, progress=False)
    train = tuple(part[: options.train] for part in benchmark.train)
    test = tuple(part[: options.tests] for part in benchmark.test)
    exact: dict[float, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, execution in (
            ("without a store", {}),
            ("new store", {"store": f"{folder}/float32"}),
            ("full store", {"store": f"{folder}/float32"}),
            ("new store, float16", {"store": f"{folder}/float16", "store_dtype": torch.float16}),
            ("full store, float16", {"store": f"{folder}/float16", "store_dtype": torch.float16}),
            ("new store, bfloat16", {"store": f"{folder}/bfloat16", "store_dtype": torch.bfloat16}),
            ("full store, bfloat16", {"store": f"{folder}/bfloat16", "store_dtype": torch.bfloat16}),
        ):
            print(json.dumps({"fit": name, **measured(benchmark.task, train, test, options.m, execution, exact)}))


def measured(
    task: rf.Task, train: Any, test: Any, m: int, execution: dict[str, Any], exact: dict[float, Tensor]
) -> dict[str, Any]:
    """CPU seconds of a fit, bytes of its store, and errors of its scores; the first fit's scores are `exact`."""
    solver = rf.solvers.Sketched(rf.sketches.SJLT(m), corrected=False)
    influence = rf.Influence(
        task, solver=solver, damping=DAMPINGS[0], execution=rf.Execution(**execution), progress=False
    )
    begin, clock = time.process_time(), time.perf_counter()
    influence.fit(train)
    found: dict[str, Any] = {"cpu seconds": time.process_time() - begin, "seconds": time.perf_counter() - clock}
    for damping in DAMPINGS:
        values = influence.at(damping).score(test, errors=False).values.double()
        expected = exact.setdefault(damping, values)
        found[f"error at {damping:g}"] = float((values - expected).norm() / expected.norm())
    if "store" in execution:
        found["bytes"] = describe(open_place(Path(execution["store"]))).size
        found |= influence.diagnostics["store"]
    return found


if __name__ == "__main__":
    main()
