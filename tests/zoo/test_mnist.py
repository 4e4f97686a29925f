"""Finding, verifying and fetching MNIST, on tiny files in the official layouts served from this machine."""

import functools
import gzip
import hashlib
import http.server
import struct
import threading

import numpy as np
import pytest
import torch

from refluence.errors import DataError
from refluence.zoo import mnist
from refluence.zoo.idx import read_idx

ROWS = 6


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def contents(monkeypatch):
    """The four files with little in them, known by their checksums as the real ones are."""
    generator = np.random.default_rng(0)
    contents, files = {}, []
    for official in mnist.FILES:
        shape = (ROWS, 28, 28) if "images" in official.name else (ROWS,)
        unpacked = idx_bytes(generator.integers(0, 10, shape))
        gzipped = gzip.compress(unpacked, mtime=0)
        contents[official.name], contents[f"{official.name}.gz"] = unpacked, gzipped
        sums = [hashlib.sha256(form).hexdigest() for form in (gzipped, unpacked)]
        files.append(mnist.OfficialFile(official.name, *sums, len(gzipped)))
    monkeypatch.setattr(mnist, "FILES", tuple(files))
    return contents


def put(folder, contents, gzipped):
    folder.mkdir(parents=True)
    for name, content in contents.items():
        if name.endswith(".gz") == gzipped:
            (folder / name).write_bytes(content)


@pytest.fixture
def data(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("REFLUENCE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize("gzipped", [True, False])
@pytest.mark.parametrize("layout", ["mnist", "MNIST/raw"])
def test_both_layouts_gzipped_or_unpacked(data, contents, layout, gzipped):
    put(data / layout, contents, gzipped)
    assert mnist.find() == data / layout
    (x, y), (test_x, _) = mnist.load(4, 3)
    assert x.shape == (4, 1, 28, 28)
    assert test_x.shape == (3, 1, 28, 28)
    raw = np.frombuffer(contents["train-images-idx3-ubyte"][16:], np.uint8)[: 4 * 784].reshape(4, 1, 28, 28)
    torch.testing.assert_close(x, (torch.tensor(raw) / 255 - 0.1307) / 0.3081)
    assert y.tolist() == list(contents["train-labels-idx1-ubyte"][8:12])


def test_the_cache_comes_after_the_users_folder(data, cache, contents):
    put(cache / "data" / "mnist", contents, gzipped=True)
    assert mnist.find() == cache / "data" / "mnist"
    put(data / "mnist", contents, gzipped=False)
    assert mnist.find() == data / "mnist"


def test_an_incomplete_folder_is_not_taken(data, contents):
    put(data / "mnist", contents, gzipped=True)
    (data / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    assert mnist.find() is None


def test_a_missing_set_names_the_three_ways_and_downloads_nothing(data, monkeypatch):
    monkeypatch.setattr(mnist, "MIRRORS", ("http://must-not-be-asked.invalid/",))
    with pytest.raises(DataError) as caught:
        mnist.load()
    text = str(caught.value)
    assert "refluence data fetch mnist" in text
    assert "$REFLUENCE_DATA" in text
    assert "MNIST/raw" in text
    assert str(data / "mnist") in text


def test_a_wrong_checksum_names_file_expected_and_got(data, contents):
    put(data / "mnist", contents, gzipped=True)
    bad = data / "mnist" / "train-images-idx3-ubyte.gz"
    bad.write_bytes(b"not it")
    with pytest.raises(DataError) as caught:
        mnist.load(4, 3)
    text = str(caught.value)
    assert str(bad) in text
    assert mnist.FILES[0].gzipped in text
    assert hashlib.sha256(b"not it").hexdigest() in text


def test_more_rows_than_there_are(data, contents):
    put(data / "mnist", contents, gzipped=True)
    with pytest.raises(DataError, match="holds 6 rows; 7 cannot"):
        mnist.load(7, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0", "cannot be read"),
        (struct.pack(">HBBI", 0, 13, 1, 2) + b"12345678", "unsigned bytes"),
        (struct.pack(">HBBI", 0, 8, 1, 9) + b"123", "cut short"),
    ],
)
def test_a_damaged_idx_file(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(path)


@pytest.fixture
def mirror(tmp_path, contents):
    """A server on this machine with the gzipped files."""
    put(tmp_path / "mirror", contents, gzipped=True)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "mirror"))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield tmp_path / "mirror", f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


def test_fetch_takes_the_next_mirror_and_the_cache_is_found(cache, mirror, monkeypatch):
    _, address = mirror
    monkeypatch.delenv("REFLUENCE_DATA", raising=False)
    monkeypatch.setattr(mnist, "MIRRORS", (f"{address}nowhere/", address))
    folder = mnist.fetch(progress=False)
    assert folder == cache / "data" / "mnist" == mnist.find()
    assert len(mnist.load(2, 2)[0][1]) == 2
    monkeypatch.setattr(mnist, "MIRRORS", ())  # a second fetch asks nobody
    with pytest.raises(DataError, match="could not be downloaded"):
        mnist.fetch(progress=False)


def test_fetch_refuses_a_file_that_is_not_the_published_one(cache, mirror, monkeypatch):
    folder, address = mirror
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"something else")
    monkeypatch.setattr(mnist, "MIRRORS", (address,))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz could not be downloaded"):
        mnist.fetch(progress=False)
    assert not list((cache / "data" / "mnist").glob("train-images*"))
