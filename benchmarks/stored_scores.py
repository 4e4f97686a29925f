"""Peak memory of scores that are held and of scores that are written tile by tile, each in a process of its own.

    python -m benchmarks.stored_scores held
    python -m benchmarks.stored_scores written --memory 1GB

The MNIST mlp, SJLT(512), its 5,000 train rows, and test rows drawn with repetition to 20,000. Memory is the process's
largest (`ru_maxrss`) after loading, after the fit and after the scores; CPU seconds are of the scores and their top 5.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time

import torch

import refluence as rf
from refluence.zoo import load_benchmark


def main() -> None:
    """Run once and print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", choices=("held", "written"))
    parser.add_argument("--memory", default="8GB")
    parser.add_argument("--tests", type=int, default=20_000)
    parser.add_argument("--m", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    benchmark = load_benchmark("mnist", "mlp", progress=False)
    drawn = torch.randint(len(benchmark.test[0]), (options.tests,), generator=torch.Generator().manual_seed(0))
    test = tuple(part[drawn] for part in benchmark.test)
    peaks = {"loaded": _peak()}
    solver = rf.solvers.Sketched(rf.sketches.SJLT(options.m))
    execution = rf.Execution(memory=options.memory)
    influence = rf.Influence(benchmark.task, solver=solver, damping=1e-2, execution=execution, progress=False)
    influence.fit(benchmark.train)
    peaks["fitted"] = _peak()
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        if options.scores == "held":
            total = float(influence.score(test, errors=False).top(5)["score"].sum())
        else:
            total = float(influence.score(test, errors=False, out=f"{folder}/scores").top(5)["score"].sum())
    peaks["scored"] = _peak()
    seconds = time.process_time() - begin
    print(json.dumps({**vars(options), "peak MB": peaks, "cpu seconds": seconds, "sum of the top 5": total}))


def _peak() -> float:
    """Megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
