"""Time and memory against rows, parameters and sketch size, and what a second worker and a thousand shards do.

    python -m benchmarks.scaling rows [--n 1000 10000 100000 1000000] [--m 512]
    python -m benchmarks.scaling sizes [--n 10000]
    python -m benchmarks.scaling workers [--n 40000] [--repeats 3] [--model cnn]
    python -m benchmarks.scaling shards [--shards 1000] [--rows 512]

The model is 784-128w-64w-10 as initialised, for a width w; row i is image i mod 60,000 of MNIST's training set times a
factor between 0.9 and 1.1 of its own, so that rows beyond 60,000 are synthetic. Every line of `rows` and `sizes` is a
process of its own with one thread: CPU seconds of a fit with solver Sketched(SJLT(m)), of 10 tests scored with errors,
and the largest resident memory. `workers` and `shards` take seconds on the clock on workers of one thread each, after
a small fit that lets them import; CPU seconds of the workers and of everything else are counted beside.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import refluence as rf
from refluence.zoo import load_dataset

TESTS, DAMPING, GOLDEN = 10, 1.0, 0.6180339887498949
BATCH = 256


class Rows(Dataset):
    """n rows made of MNIST's training images."""

    def __init__(self, n: int) -> None:
        images, labels = load_dataset("mnist", n_train=60_000).train
        self.images, self.labels, self.n = images.flatten(1), labels, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        at = row % len(self.images)
        return self.images[at] * (0.9 + 0.2 * (row * GOLDEN % 1.0)), self.labels[at]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        index = torch.tensor(rows)
        at = index % len(self.images)
        images = self.images[at] * (0.9 + 0.2 * (index * GOLDEN % 1.0))[:, None]
        return list(zip(images, self.labels[at], strict=True))


def main() -> None:
    """Run and print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    rows = commands.add_parser("rows")
    rows.add_argument("--n", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    rows.add_argument("--m", type=int, default=512)
    sizes = commands.add_parser("sizes")
    sizes.add_argument("--n", type=int, default=10_000)
    workers = commands.add_parser("workers")
    workers.add_argument("--n", type=int, default=40_000)
    workers.add_argument("--model", choices=("mlp", "cnn"), default="cnn")
    workers.add_argument("--repeats", type=int, default=3)
    shards = commands.add_parser("shards")
    shards.add_argument("--shards", type=int, default=1_000)
    shards.add_argument("--rows", type=int, default=512)
    one = commands.add_parser("one")
    for name in ("n", "m", "width"):
        one.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "one":
        show(single(options.n, options.m, options.width))
    elif options.command == "rows":
        for n in options.n:
            apart(n, options.m, 1)
    elif options.command == "sizes":
        for m, width in ((256, 1), (512, 1), (1024, 1), (2048, 1), (4096, 1), (512, 2), (512, 4), (512, 8)):
            apart(options.n, m, width)
    elif options.command == "workers":
        compare_workers(options.n, options.repeats, options.model)
    else:
        many_shards(options.shards, options.rows)


def show(found: dict[str, Any]) -> None:
    """One line."""
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}), flush=True)


def apart(n: int, m: int, width: int) -> None:
    """One size in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scaling", "one", "--n", n, "--m", m, "--width", width]
    subprocess.run([str(part) for part in command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def convolutional(**execution: Any) -> rf.Influence:
    """A network whose gradients are nearly all of the work: 63,786 parameters, 2.9 million multiply-adds forward."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1568, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    return rf.Influence(
        rf.Task(model),
        solver=rf.solvers.Sketched(rf.sketches.Kronecker(16, 16)),
        damping=DAMPING,
        batch_size=BATCH,
        progress=False,
        execution=rf.Execution(**execution),
    )


def influence_of(m: int, width: int, **execution: Any) -> rf.Influence:
    """The method that is measured."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 128 * width), nn.ReLU(), nn.Linear(128 * width, 64 * width), nn.ReLU(), nn.Linear(64 * width, 10)
    )
    return rf.Influence(
        rf.Task(model),
        solver=rf.solvers.Sketched(rf.sketches.SJLT(m)),
        damping=DAMPING,
        batch_size=BATCH,
        progress=False,
        execution=rf.Execution(**execution),
    )


def single(n: int, m: int, width: int) -> dict[str, Any]:
    """A fit and some scores in this process."""
    data = Rows(n)
    tests = tuple(torch.stack(part) for part in zip(*data.__getitems__(range(TESTS)), strict=True))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Beyond some GB the projected rows go to a file, as a user would have it.
    influence = influence_of(m, width, offload="disk" if 4 * n * m > 1e9 else "none")
    begin = time.process_time()
    influence.fit(data)
    fitted = time.process_time() - begin
    begin = time.process_time()
    influence.score(tests)
    scored = time.process_time() - begin
    return {
        "n": n,
        "d": influence.n_parameters,
        "m": m,
        "fit cpu s": fitted,
        "fit cpu us a row": 1e6 * fitted / n,
        "score cpu s": scored,
        "MB before": before / 1024,
        "MB at most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "MB of projected rows": 4e-6 * n * m,
    }


class Cluster:
    """One-thread workers on this machine, and the CPU seconds that they have taken."""

    def __init__(self, workers: int) -> None:
        from distributed import Client, LocalCluster

        self.cluster = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
        self.client = Client(self.cluster)
        influence_of(64, 1, cluster=self.client).fit(partial(Rows, 8 * BATCH))

    def seconds(self) -> tuple[float, float]:
        """(of the workers, of this process with the scheduler)."""
        pids = self.client.run(os.getpid).values()
        spent = [psutil.Process(pid).cpu_times() for pid in pids]
        return sum(t.user + t.system for t in spent), time.process_time()

    def fit(self, n: int, model: str = "mlp", **execution: Any) -> dict[str, float]:
        """A fit of n rows that the workers read."""
        execution = {"cluster": self.client, **execution}
        influence = convolutional(**execution) if model == "cnn" else influence_of(512, 1, **execution)
        before, begin = self.seconds(), time.perf_counter()
        influence.fit(partial(Rows, n))
        clock = time.perf_counter() - begin
        after = self.seconds()
        return {"seconds": clock, "workers cpu s": after[0] - before[0], "others cpu s": after[1] - before[1]}

    def close(self) -> None:
        """Stop the workers."""
        self.client.close()
        self.cluster.close()


def compare_workers(n: int, repeats: int, model: str) -> None:
    """The same fit on one worker and on two, in turns."""
    os.environ["OMP_NUM_THREADS"] = "1"
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for count, seconds in times.items():
            cluster = Cluster(count)
            found = cluster.fit(n, model)
            cluster.close()
            seconds.append(found["seconds"])
            show({"workers": count, "n": n, "model": model, **found})
    show({"median of one / median of two": median(times[1]) / median(times[2])})


def many_shards(shards: int, rows: int) -> None:
    """One worker with as many shards as asked for, with ten, and this process without a cluster."""
    os.environ["OMP_NUM_THREADS"] = "1"
    n = shards * rows
    begin = time.perf_counter()
    influence_of(512, 1).fit(Rows(n))
    show({"workers": 0, "n": n, "seconds": time.perf_counter() - begin})
    for size in (rows, n // 10):
        with tempfile.TemporaryDirectory() as folder:
            cluster = Cluster(1)
            found = cluster.fit(n, shard_rows=size)
            stored = cluster.fit(n, shard_rows=size, store=f"{folder}/store") if size == rows else {}
            cluster.close()
            show({"workers": 1, "shards": n // size, "n": n, **found, **{f"stored: {k}": v for k, v in stored.items()}})


if __name__ == "__main__":
    main()
