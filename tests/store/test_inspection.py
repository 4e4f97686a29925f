"""`refluence store`: what is there, what is damaged, what can go."""

import shutil
import time

import pytest
import torch

from refluence.store import describe, prune, verify
from refluence.store.places import open_place
from support.cli import run
from support.stored import SHARD, N, data, fitted, record, shards

TRAIN = data(N)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of N rows with the norms that its damping needed."""
    path = tmp_path_factory.mktemp("made") / "store"
    fitted(TRAIN, path)
    return path


@pytest.fixture
def store(made, tmp_path):
    """A copy to be harmed."""
    return shutil.copytree(made, tmp_path / "store")


def test_what_a_store_holds(store):
    rows, norms = describe(open_place(store)).parts
    files = shards(store)
    assert (rows.name, rows.rows, rows.shards) == ("", N, N // SHARD)
    assert (norms.name, norms.rows) == ("norms", N)
    assert rows.size == sum(path.stat().st_size for path in files)
    assert abs(rows.newest - time.time()) < 600
    assert rows.oldest == min(path.stat().st_mtime for path in files)
    assert rows.fingerprint["sketch"] == {"kind": "SJLT", "m": 32, "nonzeros": 1, "seed": 0}
    assert (rows.temporary, rows.damaged) == (0, ())


def test_rows_that_two_shards_hold_count_once(store):
    fitted(tuple(x.roll(1, 0) for x in data(N + 1)), store)
    assert describe(open_place(store)).parts[0].rows == N + 1


def test_info_shows_it(store):
    output = run("store", "info", store).output
    assert "60" in output
    assert "sketch: kind=SJLT, m=32, nonzeros=1, seed=0" in output
    assert "dtype stored: float32" in output
    assert "damaged" not in output


def test_verify_passes_a_whole_store(store):
    assert "10 of 10 files are whole" in run("store", "verify", store).output


def harm(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_verify_names_what_is_damaged_and_fails(store):
    one, other = shards(store)[1], shards(store / "norms")[0]
    harm(one)
    other.write_bytes(other.read_bytes()[:100])
    output = run("store", "verify", store, code=1).output
    assert f"{one.name}: damaged" in output
    assert f"norms/{other.name}: damaged" in output
    assert "8 of 10 files are whole" in output
    assert "1 damaged" in run("store", "info", store).output


def test_prune_takes_what_is_of_no_use_and_nothing_else(store):
    files = shards(store)
    harm(files[2])
    (store / ".half.zarr.zip.abc.part").write_bytes(b"half")
    other = store.parent / "other"
    fitted(TRAIN, other, store_dtype=torch.float16)
    stranger = shards(other)[0]
    shutil.copy(stranger, store / "a-stranger.zarr.zip")
    # its name says nothing of what it holds, so that it is damaged; under its own name it is of another fingerprint
    files[4].rename(store.parent / "kept.zarr.zip")
    shutil.copy(shards(other)[4], store / shards(other)[4].name)
    listed = run("store", "prune", store, "--dry-run").output
    assert "4 files" in listed
    for name, why in (
        (files[2].name, "damaged"),
        (".half.zarr.zip.abc.part", "temporary"),
        ("a-stranger.zarr.zip", "damaged: it holds other rows than its name says"),
        (files[4].name, "of another fingerprint"),
    ):
        assert any(line.startswith(name) and why in line for line in listed.splitlines()), (name, listed)
    assert len(shards(store)) == 6
    assert "removed" in run("store", "prune", store).output
    assert [path.name for path in shards(store)] == [files[i].name for i in (0, 1, 3)]
    assert list(store.glob("*.part")) == []
    assert prune(open_place(store)) == []
    again = fitted(TRAIN, store)
    assert record(again)["rows_made"] == 2 * SHARD
    assert verify(open_place(store)) == []


def test_prune_takes_shards_whose_rows_others_hold(store):
    fitted(data(N + 4), store)
    one = shards(store)[-1]
    assert one.name.startswith("0000000060-0000000064")
    longer = store.parent / "longer"
    fitted(data(N + 8), longer)
    shutil.copy(shards(longer)[-1], store)
    [found] = prune(open_place(store))
    assert (found.name, found.why) == (one.name, "its rows are in other shards")
    assert record(fitted(data(N + 8), store))["rows_made"] == 0


def test_two_shards_of_the_same_rows_are_not_both_taken(store):
    order = torch.arange(N).roll(1)
    moved = store.parent / "moved"
    fitted(tuple(x[order] for x in TRAIN), moved)
    for path in shards(moved):
        shutil.copy(path, store)
    assert prune(open_place(store))
    assert record(fitted(TRAIN, store))["rows_made"] == 0
    assert describe(open_place(store)).parts[0].rows == N
    assert prune(open_place(store)) == []


@pytest.mark.parametrize("command", ["info", "verify", "prune"])
def test_a_folder_without_a_store_is_an_error(command, tmp_path):
    assert "holds no store of gradients" in run("store", command, tmp_path, code=1).output
