"""Processes: one that is killed while it fits, and two with one store."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from refluence.store import verify
from refluence.store.places import open_place
from support import fit_with_store
from support.stored import SHARD, K, N, data, fitted, record, shards

TEST = data(K, seed=2)


@pytest.fixture
def processes(tmp_path):
    """Starts processes that fit, which wait for a line each."""
    started = []

    def start(store, *more):
        path = [str(Path(fit_with_store.__file__).parents[1]), *sys.path]
        process = subprocess.Popen(
            [sys.executable, fit_with_store.__file__, str(store), str(tmp_path / f"{len(started)}.pt"), *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def go(*running):
    for process in running:
        assert process.stdout.readline() == b"ready\n"
    for process in running:
        process.stdin.write(b"\n")
        process.stdin.flush()


def test_a_killed_fit_goes_on_from_its_shards(processes, tmp_path):
    store = tmp_path / "store"
    process = processes(store, "0.02")
    go(process)
    deadline = time.monotonic() + 60
    while len(shards(store)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    found = len(shards(store))
    assert 2 <= found < N // SHARD
    again = fitted(data(N), store)
    assert (record(again)["rows_read"], record(again)["rows_made"]) == (found * SHARD, N - found * SHARD)
    assert torch.equal(again.score(TEST).values, fitted(data(N)).score(TEST).values)
    assert verify(open_place(store), progress=False) == []


def test_two_processes_on_one_store_are_both_right(processes, tmp_path):
    store = tmp_path / "store"
    both = [processes(store, "0.002"), processes(store, "0.002")]
    go(*both)
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    expected = fitted(data(N)).score(TEST).values
    for index in range(2):
        assert torch.equal(torch.load(tmp_path / f"{index}.pt"), expected)
    assert verify(open_place(store), progress=False) == []
    assert len(shards(store)) == N // SHARD
    assert list(store.rglob("*.part")) == []
    assert record(fitted(data(N), store))["rows_made"] == 0
