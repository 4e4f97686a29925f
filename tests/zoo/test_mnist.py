"""MNIST and Fashion-MNIST from IDX files."""

import struct

import numpy as np
import pytest
import torch

from refluence.errors import DataError
from refluence.zoo import load_dataset, mnist
from refluence.zoo.idx import read_idx
from refluence.zoo.official_files import locate
from support.official import knowing, put

ROWS = 6
NAMES = (mnist.TRAIN_IMAGES, mnist.TRAIN_LABELS, mnist.TEST_IMAGES, mnist.TEST_LABELS)


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def contents():
    generator = np.random.default_rng(0)
    shapes = {name: (ROWS, 28, 28) if "images" in name else (ROWS,) for name in NAMES}
    return {name: idx_bytes(generator.integers(0, 10, shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("source", "folder", "scale"),
    [
        (mnist.MNIST, "mnist", (0.1307, 0.3081)),
        (mnist.MNIST, "MNIST/raw", (0.1307, 0.3081)),
        (mnist.FASHION_MNIST, "fashion_mnist", (0.2860, 0.3530)),
        (mnist.FASHION_MNIST, "FashionMNIST/raw", (0.2860, 0.3530)),
    ],
)
def test_the_first_rows_normalised_and_their_labels(tmp_path, monkeypatch, cache, contents, source, folder, scale):
    monkeypatch.setenv("REFLUENCE_DATA", str(tmp_path))
    put(tmp_path / folder, contents)
    (x, y), (test_x, _) = mnist.load(locate(knowing(source, contents)), 4, 3, scale)
    assert x.shape == (4, 1, 28, 28)
    assert test_x.shape == (3, 1, 28, 28)
    raw = np.frombuffer(contents[mnist.TRAIN_IMAGES][16:], np.uint8)[: 4 * 784].reshape(4, 1, 28, 28)
    torch.testing.assert_close(x, (torch.tensor(raw) / 255 - scale[0]) / scale[1])
    assert y.tolist() == list(contents[mnist.TRAIN_LABELS][8:12])


def test_more_rows_than_there_are(tmp_path, monkeypatch, cache, contents):
    monkeypatch.setenv("REFLUENCE_DATA", str(tmp_path))
    put(tmp_path / "mnist", contents)
    files = locate(knowing(mnist.MNIST, contents))
    for rows in (7, 0, -1):
        with pytest.raises(DataError, match=rf"mnist: train-images.* holds 6 rows; {rows} cannot be taken: ask for 1"):
            mnist.load(files, rows, 3, mnist.MNIST_SCALE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"\0\0", "cannot be read"),
        (struct.pack(">HBB", 0, 8, 3), "cannot be read"),
        (struct.pack(">HBBI", 0, 13, 1, 2) + b"12345678", "unsigned bytes"),
        (struct.pack(">HBBI", 0, 8, 1, 9) + b"123", "cut short"),
    ],
)
def test_a_damaged_idx_file(content, message):
    with pytest.raises(DataError, match=f"a file.*{message}"):
        read_idx(content, None, "a file")


@pytest.mark.data
@pytest.mark.skipif(locate(mnist.MNIST) is None, reason="MNIST is not on this machine")
def test_mnist_is_the_published_benchmark():
    split = load_dataset("mnist")
    x, y = split.train
    assert x.shape == (5000, 1, 28, 28)
    assert split.test[0].shape == (500, 1, 28, 28)
    assert y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert split.test[1][:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    pixels = x * split.image.std + split.image.mean
    assert pixels.min().item() == pytest.approx(0, abs=1e-6)
    assert pixels.max().item() == pytest.approx(1, abs=1e-6)
    assert x.min().item() == pytest.approx(-0.1307 / 0.3081)


@pytest.mark.data
@pytest.mark.skipif(locate(mnist.MNIST) is None, reason="MNIST is not on this machine")
def test_the_whole_of_mnist_begins_with_the_benchmark_and_has_the_files_pixels():
    whole, part = load_dataset("mnist", n_train=60_000, n_test=10_000), load_dataset("mnist")
    assert whole.train[0].shape == (60_000, 1, 28, 28)
    assert torch.bincount(whole.test[1]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert torch.equal(whole.train[0][:5000], part.train[0])
    assert torch.equal(whole.train[1][:5000], part.train[1])
    raw = np.frombuffer(locate(mnist.MNIST).read(mnist.TRAIN_IMAGES), np.uint8, offset=16).copy()
    assert torch.equal(whole.image.pixels(whole.train[0]).flatten(), torch.from_numpy(raw))


@pytest.mark.data
@pytest.mark.skipif(locate(mnist.FASHION_MNIST) is None, reason="Fashion-MNIST is not on this machine")
def test_fashion_mnist_is_the_published_benchmark():
    split = load_dataset("fashion_mnist")
    assert split.train[0].shape == (5000, 1, 28, 28)
    assert split.train[1][:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert split.class_names[split.train[1][0]] == "ankle boot"
    whole = load_dataset("fashion_mnist", n_train=60_000).train[0]
    assert whole.mean().item() == pytest.approx(0, abs=1e-3)
    assert whole.std().item() == pytest.approx(1, abs=1e-3)
