"""Where a store is: folders and URLs, and what is said when they cannot be used."""

import errno
import json
import os
from pathlib import Path

import fsspec
import pytest
import torch

from refluence import files
from refluence.errors import PlanError, StoreError
from refluence.execution import Execution
from refluence.store.places import LocalFolder, RemoteFolder, open_place
from support.stored import SHARD, K, N, data, fitted, record, shards

TRAIN, TEST = data(N), data(K, seed=2)


@pytest.fixture(params=["local", "remote"])
def place(request, tmp_path):
    if request.param == "local":
        return open_place(tmp_path / "store")
    fsspec.filesystem("memory").store.clear()
    return open_place("memory://bucket/store")


def test_objects_are_written_listed_read_and_removed(place):
    assert (place.names(), place.parts()) == ([], [])
    place.write("b", b"first")
    place.write("a", b"other")
    place.write("b", b"second")
    place.below("part").write("c", b"")
    assert (place.names(), place.parts(), place.below("part").names()) == (["a", "b"], ["part"], ["c"])
    with place.open("b") as file:
        file.seek(3)
        assert file.read() == b"ond"
    size, when = place.about("b")
    assert size == 6
    assert when > 1.6e9
    place.remove("b")
    place.remove("b")
    assert place.names() == ["a"]
    with pytest.raises(FileNotFoundError):
        place.open("b")


def test_paths_and_urls():
    assert isinstance(open_place("folder"), LocalFolder)
    assert open_place("file:///tmp/folder").path == Path("/tmp/folder")
    assert open_place("~/folder").path == Path.home() / "folder"
    assert isinstance(open_place("memory://folder"), RemoteFolder)


def test_a_store_at_a_url_is_used_as_one_in_a_folder():
    fsspec.filesystem("memory").store.clear()
    url = "memory://bucket/gradients"
    first = fitted(TRAIN, url)
    second = fitted(TRAIN, url)
    assert (record(first)["rows_made"], record(second)["rows_made"]) == (N, 0)
    assert torch.equal(first.score(TEST).values, second.score(TEST).values)


def test_a_scheme_that_nobody_knows():
    with pytest.raises(StoreError, match=r"nowhere://bucket has the scheme 'nowhere', which fsspec does not know"):
        fitted(TRAIN, "nowhere://bucket")


def test_a_scheme_whose_package_is_missing():
    fsspec.register_implementation("absent", "absent_fs.FS", clobber=True, errtxt="Install it")
    with pytest.raises(StoreError, match=r"needs a package that is not installed: Install it"):
        open_place("absent://bucket")


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file is a file: give a folder"):
        fitted(TRAIN, tmp_path / "file")


def test_nor_is_a_folder_of_other_things(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match=r"holds thesis.tex and no store of gradients"):
        fitted(TRAIN, tmp_path)
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "an app"}))
    with pytest.raises(StoreError, match="something else than a store of gradients"):
        fitted(TRAIN, tmp_path)


def failing(monkeypatch, number, after):
    """From the `after`-th file on, the system refuses to have one on the disk."""
    count = iter(range(10**6))
    original = files._to_disk

    def refuse(path):
        if path.is_file() and next(count) >= after:
            raise OSError(number, os.strerror(number), str(path))
        original(path)

    monkeypatch.setattr(files, "_to_disk", refuse)


def test_a_full_disk_is_named_and_loses_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, errno.ENOSPC, after=3)
        with pytest.raises(StoreError, match=r"no room for 0000000024-.* \(\d.* KB\) .* goes on from there"):
            fitted(TRAIN, tmp_path)
    assert len(shards(tmp_path)) == 2
    assert list(tmp_path.glob(".*")) == []
    again = fitted(TRAIN, tmp_path)
    assert record(again)["rows_read"] == 2 * SHARD


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_store_that_may_not_be_written_to(number, tmp_path, monkeypatch):
    failing(monkeypatch, number, after=0)
    with pytest.raises(StoreError, match=r"manifest.json may not be written to the store .* may write to"):
        fitted(TRAIN, tmp_path)


def test_a_whole_store_needs_no_writing(tmp_path, monkeypatch):
    fitted(TRAIN, tmp_path)
    failing(monkeypatch, errno.EROFS, after=0)
    assert record(fitted(TRAIN, tmp_path))["rows_made"] == 0


def test_a_shard_that_may_not_be_read(tmp_path, monkeypatch):
    fitted(TRAIN, tmp_path)
    original = Path.open

    def refuse(path, *args, **kwargs):
        if path.suffix == ".zip":
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StoreError, match=r"0000000000-.* may not be read"):
        fitted(TRAIN, tmp_path)


def test_a_temporary_file_that_is_pruned_under_a_writer_is_written_again(tmp_path, monkeypatch):
    place, original, lost = open_place(tmp_path), files._to_disk, []

    def lose(path):
        original(path)
        if not lost and path.suffix == ".part":
            lost.append(path)
            path.unlink()

    monkeypatch.setattr(files, "_to_disk", lose)
    place.write("name", b"content")
    assert lost
    assert (place.names(), (tmp_path / "name").read_bytes()) == (["name"], b"content")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "gpu"}, 'offload must be "none", "cpu" or "disk", not \'gpu\''),
        ({"store": "s", "store_dtype": torch.int8}, "store_dtype must be torch.float16, bfloat16 or float32"),
        ({"store": "s", "shard_rows": 0}, "shard_rows must be an integer of at least 1, not 0"),
        ({"shard_rows": 8}, "are of a store: give store=PATH too"),
        ({"store_dtype": torch.float16}, "are of a store: give store=PATH too"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(PlanError, match=message):
        Execution(**options)
