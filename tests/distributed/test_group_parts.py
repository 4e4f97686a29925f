"""Processes of a torch.distributed group that share the rows, run by torchrun."""

import os
import subprocess
import sys

import pytest
import torch

import refluence as rf
from support import grouped
from support.grouped import SOLVERS, K, N, data, fitted, results, task

pytestmark = pytest.mark.slow

RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", grouped.__file__, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", SOLVERS)
def test_every_process_has_the_results_of_one_process_alone(name, found):
    expected = results(fitted(name))
    for of_rank in found:
        assert of_rank[name].keys() == expected.keys()
        for what, values in expected.items():
            scale = float(values.abs().max())
            torch.testing.assert_close(of_rank[name][what], values, rtol=0, atol=1e-9 * scale)


def test_each_process_makes_the_gradients_of_its_own_rows(found):
    counts = [int(of_rank["rows here"]) for of_rank in found]
    assert sum(counts) == N
    assert min(counts) > N / 3


def test_scores_in_a_folder_and_a_saved_fit_are_written_once_and_whole(folder, found):
    for of_rank in found:
        torch.testing.assert_close(of_rank["stored scores"], found[0]["sketched"]["scores"], rtol=1e-12, atol=0)
    again = rf.Influence.load(folder / "fit", task())
    expected = found[0]["sketched"]["scores"]
    torch.testing.assert_close(again.score(data(K, 2)).values, expected, rtol=1e-9, atol=0)


def test_a_store_is_filled_by_all_and_read_by_all(found):
    for of_rank in found:
        first, again = of_rank["store"]
        assert (first["rows_read"], first["rows_made"]) == (0, N)
        assert (again["rows_read"], again["rows_made"]) == (N, 0)
        assert torch.equal(of_rank["stored"]["scores"], found[0]["sketched"]["scores"])


def test_a_bad_example_of_one_process_stops_all_and_is_named(folder):
    for rank in range(RANKS):
        assert "row 170" in (folder / f"poisoned-{rank}.txt").read_text()
