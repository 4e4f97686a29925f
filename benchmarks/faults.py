"""What kills and damage do: workers killed at random moments, clients killed, shards cut or with a bit changed.

    python -m benchmarks.faults workers [--times 5]      # a kill of one of two workers in a fit with its scores
    python -m benchmarks.faults clients [--times 10]     # a kill of the process that fits with a store, then a new one
    python -m benchmarks.faults shards  [--times 100]    # a change of one shard, then `verify` and a fit

A run survives where its scores are those of an undisturbed one bit for bit. Kills are SIGKILL, at moments that are
uniform over the time of an undisturbed run. Damage is one bit of a file changed, or the file cut at a random length.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import dask
import torch
from distributed import Client, LocalCluster
from torch import Tensor, nn

import refluence as rf
from refluence.store import verify
from refluence.store.places import open_place

N, TESTS, BATCH = 1024, 8, 32
SECONDS = 0.02
"""That a forward pass of a batch takes longer, so that there is time to be killed in."""
SOLVERS = {
    "sketched": rf.solvers.Sketched(rf.sketches.SJLT(64, seed=3)),
    "sketched with a store": rf.solvers.Sketched(rf.sketches.SJLT(64, seed=3)),
    "K-FAC": rf.solvers.Kfac(),
    "conjugate gradients": rf.solvers.ConjugateGradient(),
}


class Slow(nn.Module):
    """A small network that takes its time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5)).double()

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        time.sleep(self.seconds if len(x) > 1 else 0.0)
        return self.layers(x)


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 20, generator=generator).double(), torch.randint(5, (n,), generator=generator)


def scores(name: str, client: Client | None, store: Path | None, seconds: float = SECONDS) -> tuple[Tensor, Any]:
    """The scores, and what the store did."""
    execution = rf.Execution(cluster=client, store=store, shard_rows=None if (client, store) == (None, None) else BATCH)
    influence = rf.Influence(
        rf.Task(Slow(seconds)),
        solver=SOLVERS[name],
        damping=0.1,
        batch_size=BATCH,
        execution=execution,
        progress=False,
    )
    influence.fit(data(N, 1))
    return influence.score(data(TESTS, 2)).values, influence.diagnostics.get("store")


def workers(times: int, draw: random.Random) -> None:
    """Kill one of two workers at a random moment."""
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as cluster:
        client = Client(cluster)
        for name in SOLVERS:
            survived, in_time = 0, 0
            for trial in range(times + 1):
                client.wait_for_workers(2, timeout=120)
                with tempfile.TemporaryDirectory() as folder:
                    store = Path(folder) / "store" if "store" in name else None
                    pid = draw.choice(sorted(client.run(os.getpid).values()))
                    begin = time.monotonic()
                    killer = threading.Timer(draw.uniform(0, length) if trial else 1e6, os.kill, (pid, signal.SIGKILL))
                    killer.start()
                    found, _ = scores(name, client, store)
                    in_time += bool(trial) and not killer.is_alive()
                    killer.cancel()
                if trial == 0:
                    # Once more, without what the first run had to import.
                    begin = time.monotonic()
                    expected, _ = scores(name, client, None)
                    length = time.monotonic() - begin
                else:
                    survived += torch.equal(found, expected)
            show(kill="worker", solver=name, tried=times, killed_in_time=in_time, survived=survived, seconds=length)


def clients(times: int, draw: random.Random) -> None:
    """Kill the process that fits with a store at a random moment, and fit again in this one."""
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as cluster:
        client = Client(cluster)
        begin = time.monotonic()
        expected, _ = scores("sketched", client, None)
        length = time.monotonic() - begin
        survived, kept = 0, []
        for _ in range(times):
            with tempfile.TemporaryDirectory() as folder:
                store = Path(folder) / "store"
                command = [sys.executable, "-m", "benchmarks.faults", "fit", cluster.scheduler_address, str(store)]
                process = subprocess.Popen(command, stdout=subprocess.PIPE)
                assert process.stdout is not None
                process.stdout.readline()
                time.sleep(draw.uniform(0, length))
                process.kill()
                process.wait()
                found, record = scores("sketched", client, store)
                survived += torch.equal(found, expected) and not verify(open_place(store), progress=False)
                kept.append(record["rows_read"])
        show(kill="client", tried=times, survived=survived, rows=N, rows_read_afterwards=sorted(kept))


def shards(times: int, draw: random.Random) -> None:
    """Damage one shard of a store, and fit again."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        expected, _ = scores("sketched", None, store, 0.0)
        for kind in ("bit", "cut"):
            verified = detected = survived = 0
            for _ in range(times // 2):
                file = draw.choice(sorted(store.glob("*.zarr.zip")))
                content = bytearray(file.read_bytes())
                if kind == "bit":
                    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
                else:
                    del content[draw.randrange(len(content)) :]
                file.write_bytes(content)
                verified += any(file.name in str(damage) for damage in verify(open_place(store), progress=False))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found, record = scores("sketched", None, store, 0.0)
                detected += record["damaged"] == [file.name] and record["rows_made"] == BATCH
                survived += torch.equal(found, expected)
            show(damage=kind, tried=times // 2, named_by_verify=verified, made_again_alone=detected, survived=survived)


def fit(address: str, store: str) -> None:
    """What the process that is killed does."""
    client = Client(address)
    print("ready", flush=True)
    scores("sketched", client, Path(store))


def show(**record: Any) -> None:
    """Print a JSON object."""
    print(json.dumps(record), flush=True)


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("workers", "clients", "shards", "fit"))
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--times", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "fit":
        fit(*options.arguments)
        return
    run, times = {"workers": (workers, 5), "clients": (clients, 10), "shards": (shards, 100)}[options.what]
    # A LocalCluster gives up a worker that is not there 15 seconds after it died, also where it died again since.
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1h"}):
        run(options.times or times, random.Random(options.seed))


if __name__ == "__main__":
    main()
