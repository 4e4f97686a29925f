"""Workers and clients that die, memory that ends and examples that are bad, with real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import refluence as rf
from refluence.distributed import cluster as cluster_facts
from refluence.distributed import dask_parts
from refluence.errors import BadExampleError, ClusterError, NonFiniteError, PlanError
from refluence.store import verify
from refluence.store.places import open_place
from support import clustered
from support.clustered import BATCH, SKETCHED, TEST, VICTIM, Files, Hungry, Load, N, Network, data, influence, noted

pytestmark = pytest.mark.slow

distributed = pytest.importorskip("distributed", reason="a cluster needs refluence[distributed]")
dask = pytest.importorskip("dask")

# A LocalCluster gives up a worker that is not there 15 seconds after it died, also where it died again since.
STAYING = {"distributed.deploy.lost-worker-timeout": "1h"}
SUPPORT = str(Path(clustered.__file__).parents[1])
SOLVERS = {
    "sketched": SKETCHED,
    "kfac": rf.solvers.Kfac(),
    "cg": rf.solvers.ConjugateGradient(),
}


def environment():
    path = os.pathsep.join([SUPPORT, *filter(None, sys.path)])
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def cluster():
    """Two worker processes, which nannies start again."""
    with (
        dask.config.set(STAYING),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", env=environment(), silence_logs=50
        ) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def client(cluster):
    with distributed.Client(cluster) as made:
        yield made


@pytest.fixture
def both(client):
    """The client when both workers are there."""
    client.wait_for_workers(2, timeout=60)
    return client


def arm(folder):
    (folder / "kill").touch()


def pids(client):
    return client.run(os.getpid)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_worker_killed_in_a_fit_changes_no_bit(both, tmp_path, name):
    plain = influence(both, solver=SOLVERS[name]).fit(data()).score(TEST).values
    before = pids(both)
    arm(tmp_path)
    fitted = influence(both, Network(tmp_path), solver=SOLVERS[name]).fit(data())
    scores = fitted.score(TEST).values
    assert not (tmp_path / "kill").exists()
    assert set(pids(both).values()) != set(before.values())
    assert torch.equal(scores, plain)
    alone = influence(solver=SOLVERS[name]).fit(data()).score(TEST).values
    torch.testing.assert_close(scores, alone, rtol=1e-9, atol=1e-12)


def test_a_worker_killed_in_a_fit_with_a_store_leaves_the_store_whole(both, tmp_path):
    plain = influence(both).fit(data()).score(TEST).values
    arm(tmp_path)
    store = tmp_path / "store"
    fitted = influence(both, Network(tmp_path), store=store).fit(data())
    assert not (tmp_path / "kill").exists()
    assert torch.equal(fitted.score(TEST).values, plain)
    assert verify(open_place(str(store)), progress=False) == []
    record = influence(both, Network(tmp_path), store=store).fit(data()).diagnostics["store"]
    assert (record["rows_read"], record["rows_made"]) == (N, 0)


def test_a_worker_killed_between_a_fit_and_its_scores(both):
    fitted = influence(both).fit(data())
    plain = fitted.score(TEST).values
    os.kill(min(pids(both).values()), signal.SIGKILL)
    assert torch.equal(fitted.score(TEST).values, plain)


def worker(address, folder, *more):
    command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "1", *more]
    options = {"env": {**os.environ, **environment()}, "stderr": subprocess.DEVNULL, "cwd": folder}
    return subprocess.Popen([*command, "--no-dashboard"], **options)


def test_workers_that_nobody_starts_again(tmp_path, monkeypatch):
    plain = influence().fit(data()).score(TEST).values
    monkeypatch.setattr(dask_parts, "PATIENCE_SECONDS", 0.5)
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address=":0", silence_logs=50) as empty,
        distributed.Client(empty) as client,
    ):
        with pytest.raises(ClusterError, match="has no workers: start some"):
            influence(client).fit(data())
        started = [worker(empty.scheduler_address, tmp_path) for _ in range(2)]
        try:
            client.wait_for_workers(2, timeout=60)
            arm(tmp_path)
            fitted = influence(client, Network(tmp_path)).fit(data())
            torch.testing.assert_close(fitted.score(TEST).values, plain, rtol=1e-9, atol=1e-12)
            assert len(client.nthreads()) == 1
            arm(tmp_path)
            with pytest.raises(ClusterError, match="lost all its workers"):
                influence(client, Network(tmp_path)).fit(data())
        finally:
            for process in started:
                process.kill()
                process.wait()


def test_a_worker_without_memory_makes_smaller_batches(both, tmp_path):
    loss = Hungry(64 << 20, limit=400 << 20)
    fitted = influence(both, Network(tmp_path), loss=loss).fit(data())
    plain = influence(both).fit(data()).score(TEST).values
    torch.testing.assert_close(fitted.score(TEST).values, plain, rtol=1e-9, atol=1e-12)
    forward = [count for counts in noted(tmp_path, "forward").values() for count in counts]
    assert 4 in forward
    assert max(forward[-8:]) <= 4


def test_a_row_that_no_memory_holds_is_named(both):
    with pytest.raises(ClusterError, match=r"train rows \d+ to \d+ in batches of one row .*give the workers more"):
        influence(both, loss=Hungry(1 << 30, limit=400 << 20)).fit(data())


@pytest.fixture(scope="module")
def small():
    """A worker that is ended at 1 GB; a task that it dies of is not tried again."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0, **STAYING}),
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            memory_limit="1GB",
            dashboard_address=":0",
            env=environment(),
            silence_logs=50,
        ) as made,
        distributed.Client(made) as client,
    ):
        yield client


def test_a_worker_ended_at_its_memory_limit_gets_smaller_batches(small):
    fitted = influence(small, loss=Hungry(80 << 20), batch_size=8).fit(data(16))
    plain = influence(batch_size=8).fit(data(16)).score(TEST).values
    torch.testing.assert_close(fitted.score(TEST).values, plain, rtol=1e-9, atol=1e-12)


def test_rows_that_end_every_worker_are_named(small):
    with pytest.raises(ClusterError, match="made train rows 0 to 0 and 1 to 1 died, with one row a batch"):
        influence(small, loss=Hungry(1 << 30), batch_size=1).fit(data(2))


def test_a_killed_client_goes_on_from_the_shards(both, tmp_path):
    store = tmp_path / "store"
    script = Path(clustered.__file__).with_name("fit_on_cluster.py")
    command = [sys.executable, str(script), both.scheduler.address, str(store), "0.15"]
    process = subprocess.Popen(command, env={**os.environ, **environment()})
    deadline = time.monotonic() + 60
    while len(list(store.glob("*.zarr.zip"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    fitted = influence(both, store=store, shard_rows=BATCH).fit(data())
    record = fitted.diagnostics["store"]
    assert 2 * BATCH <= record["rows_read"] < N
    assert record["rows_read"] + record["rows_made"] == N
    assert torch.equal(fitted.score(TEST).values, influence(both, shard_rows=BATCH).fit(data()).score(TEST).values)
    assert verify(open_place(str(store)), progress=False) == []


def poisoned():
    x, y = data()
    x[VICTIM] = torch.nan
    y[40] = 7
    return x, y


def test_a_poisoned_row_stops_the_run_and_is_named_by_its_number(both, tmp_path):
    x, y = data()
    x[VICTIM] = torch.nan
    store = tmp_path / "store"
    with pytest.raises(NonFiniteError, match=f"train row {VICTIM}") as caught:
        influence(both, store=store).fit((x, y))
    assert caught.value.row == VICTIM
    again = influence(both, store=store).fit(data()).diagnostics["store"]
    assert again["rows_read"] >= VICTIM % 32 // BATCH * BATCH
    assert again["rows_made"] >= 1


def test_a_row_that_the_loss_raises_on_is_named(both):
    x, y = data()
    y[VICTIM] = 7
    with pytest.raises(BadExampleError, match=f"train row {VICTIM} is bad") as caught:
        influence(both).fit((x, y))
    assert caught.value.row == VICTIM


@pytest.mark.parametrize("solver", ["sketched", "cg"])
def test_bad_rows_are_skipped_as_in_one_process(both, solver):
    there = influence(both, solver=SOLVERS[solver], skip_bad=True).fit(poisoned())
    here = influence(solver=SOLVERS[solver], skip_bad=True).fit(poisoned())
    assert list(there.skipped) == [40, VICTIM]
    assert there.skipped == here.skipped
    torch.testing.assert_close(there.score(TEST).values, here.score(TEST).values, rtol=1e-9, atol=1e-12)


def test_a_loader_is_called_once_in_each_process(both, tmp_path):
    fitted = influence(both, Network(tmp_path)).fit(Load(tmp_path))
    plain = influence(both).fit(data()).score(TEST).values
    assert torch.equal(fitted.score(TEST).values, plain)
    fitted.self_influence()
    loads = noted(tmp_path, "load")
    assert len(loads) == 3
    assert all(len(calls) == 1 for calls in loads.values())


def test_gradients_are_kept_from_pass_to_pass(both, tmp_path):
    fitted = influence(both, Network(tmp_path), solver=rf.solvers.ConjugateGradient()).fit(data())
    made = sum(sum(counts) for counts in noted(tmp_path, "forward").values())
    scores = fitted.score(TEST)
    fitted.score(TEST)
    assert float(scores.values.abs().max()) > 0
    assert sum(sum(counts) for counts in noted(tmp_path, "forward").values()) <= made + N + 40


def test_workers_read_their_own_rows_of_a_data_set(both, tmp_path):
    fitted = influence(both).fit(Files(tmp_path))
    assert torch.equal(fitted.score(TEST).values, influence(both).fit(data()).score(TEST).values)
    own = [set(rows) for name, rows in noted(tmp_path, "read").items() if not name.endswith(f"-{os.getpid()}")]
    # Each reads some rows at both ends to see that they stay the same, and those that decide how gradients are made.
    assert len(own) == 2
    assert all(len(rows) < 0.7 * N for rows in own)


def test_what_is_too_large_to_send_is_refused(both, monkeypatch):
    monkeypatch.setattr(cluster_facts, "LARGEST_SENT", 1000)
    with pytest.raises(ClusterError, match="give fit a function that loads it"):
        influence(both).fit(data())


def test_a_wrong_address(monkeypatch):
    from refluence.distributed import clients

    monkeypatch.setattr(clients, "SECONDS_TO_CONNECT", 0.5)
    with pytest.raises(ClusterError, match="no Dask scheduler answers at 'tcp"):
        influence("tcp://127.0.0.1:9").fit(data())
    with pytest.raises(ClusterError, match="no Dask scheduler answers at 'nowhere"):
        influence("nowhere://x").fit(data())


def test_without_dask(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(PlanError, match=r"refluence\[distributed\]"):
        influence("tcp://127.0.0.1:9").fit(data())


def test_a_normal_run_says_nothing(tmp_path):
    script = Path(clustered.__file__).with_name("fit_on_cluster.py")
    found = subprocess.run(
        [sys.executable, str(script), "own", str(tmp_path / "store"), "0"],
        env={**os.environ, **environment()},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert (found.stdout, found.stderr) == ("", "")
