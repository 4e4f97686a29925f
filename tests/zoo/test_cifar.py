"""CIFAR-10 from the official files, unpacked or not, and its cats and dogs from them or from one file."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch

from refluence.errors import DataError
from refluence.zoo import cifar, load_dataset
from refluence.zoo.official_files import locate
from support.official import knowing, put

FILES = locate(cifar.CIFAR2)
HERE = pytest.mark.skipif(
    FILES is None or not FILES.holds(cifar.CAT_DOG_FILE), reason="the file of cats and dogs is not on this machine"
)


def batch_bytes(images, labels):
    """As the official batches: rows of 3,072 bytes, channels first, and a list of labels, under byte strings."""
    data = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    return pickle.dumps({b"batch_label": b"a batch", b"labels": [int(label) for label in labels], b"data": data}, 3)


def official(images, labels, test_images, test_labels):
    """The six files from images (n, 32, 32, 3) and labels."""
    parts = np.array_split(np.arange(len(images)), 5)
    files = {
        name: batch_bytes(images[rows], labels[rows]) for name, rows in zip(cifar.TRAIN_BATCHES, parts, strict=True)
    }
    return {**files, cifar.TEST_BATCH: batch_bytes(test_images, test_labels)}


def archive(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in reversed(files.items()):
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def root(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("REFLUENCE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def rows():
    """60 train and 20 test images of noise, classes in turn."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (80, 32, 32, 3)).astype(np.uint8)
    return images[:60], np.arange(60) % 10, images[60:], np.arange(20)[::-1] % 10


def laid_out(root, rows, form, source):
    """The files of the rows in one of the official forms."""
    files = official(*rows)
    if form == "archive":
        files = {cifar.ARCHIVE: archive(files)}
        put(root, files)
    else:
        put(root / form, files)
    return locate(knowing(source, files))


FORMS = ["archive", "cifar-10-batches-py", "cifar10"]


@pytest.mark.parametrize("form", FORMS)
def test_ten_classes_in_the_official_order_over_batches(root, rows, form):
    (x, y), (test_x, test_y) = cifar.load(laid_out(root, rows, form, cifar.CIFAR10), 31, 20)
    assert x.shape == (31, 3, 32, 32)
    assert x.dtype == torch.float32
    expected = torch.from_numpy(rows[0][:31].transpose(0, 3, 1, 2) / 255 * 2 - 1).float()
    torch.testing.assert_close(x, expected)
    assert y.tolist() == rows[1][:31].tolist()
    torch.testing.assert_close(test_x, torch.from_numpy(rows[2].transpose(0, 3, 1, 2) / 255 * 2 - 1).float())
    assert test_y.tolist() == rows[3].tolist()


@pytest.mark.parametrize("form", FORMS)
def test_cats_are_0_and_dogs_1_after_filtering(root, rows, form):
    (x, y), (_, test_y) = cifar.load(laid_out(root, rows, form, cifar.CIFAR2), 7, 4, cifar.CAT_DOG)
    chosen = np.flatnonzero(np.isin(rows[1], (3, 5)))[:7]
    torch.testing.assert_close(x, torch.from_numpy(rows[0][chosen].transpose(0, 3, 1, 2) / 255 * 2 - 1).float())
    assert y.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert test_y.tolist() == [1, 0, 1, 0]


def test_more_rows_than_there_are(root, rows):
    files = laid_out(root, rows, "cifar10", cifar.CIFAR2)
    for train, test, message in ((13, 4, "cifar2 train has 12 rows; 13 cannot"), (12, 5, "cifar2 test has 4 rows")):
        with pytest.raises(DataError, match=message):
            cifar.load(files, train, test, cifar.CAT_DOG)
    for nothing in (0, -1):
        with pytest.raises(DataError, match=f"train has 12 rows; {nothing} cannot be taken: ask for 1 to 12"):
            cifar.load(files, nothing, 4, cifar.CAT_DOG)


def test_a_damaged_batch_is_named(root, rows):
    files = laid_out(root, rows, "cifar10", cifar.CIFAR10)
    path = root / "cifar10" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="data_batch_2 is not the published file"):
        cifar.load(files, 60, 20)
    assert cifar.load(files, 12, 20)[0][0].shape == (12, 3, 32, 32)


class Harmful:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_a_pickle_that_calls_a_program_is_refused(root, rows):
    files = {**official(*rows), "data_batch_1": pickle.dumps({b"data": Harmful(), b"labels": []}, 3)}
    put(root / "cifar10", files)
    with pytest.raises(DataError, match=r"holds no posix\.system|holds no nt\.system"):
        cifar.load(locate(knowing(cifar.CIFAR10, files)), 5, 5)


@pytest.mark.data
@HERE
def test_cifar2_is_the_published_benchmark():
    split = load_dataset("cifar2")
    (x, y), (test_x, test_y) = split.train, split.test
    assert x.shape == (5000, 3, 32, 32)
    assert test_x.shape == (500, 3, 32, 32)
    assert (x.min(), x.max()) == (-1, 1)
    assert split.class_names == ("cat", "dog")
    assert split.image == type(split.image)((3, 32, 32), 0.5, 0.5)
    assert abs(y.float().mean() - 0.5) < 0.02
    assert abs(test_y.float().mean() - 0.5) < 0.05


@pytest.mark.data
@HERE
def test_cats_and_dogs_are_the_same_from_one_file_and_from_the_official_ones(root):
    arrays = np.load(FILES.folder / cifar.CAT_DOG_FILE)
    split = cifar.load(FILES, 300, 50, cifar.CAT_DOG)
    official_rows = []
    for part, count in (("train", 300), ("test", 50)):
        position = arrays[f"{part}_idx"]
        total = int(position[count - 1]) + 1
        images = np.zeros((total, 32, 32, 3), np.uint8)
        labels = np.zeros(total, np.int64)
        images[position[:count]] = arrays[f"{part}_x"][:count]
        labels[position[:count]] = np.array(cifar.CAT_DOG)[arrays[f"{part}_y"][:count]]
        official_rows += [images, labels]
    files = laid_out(root, official_rows, "archive", cifar.CIFAR2)
    assert not files.holds(cifar.CAT_DOG_FILE)
    for (x, y), (other_x, other_y) in zip(split, cifar.load(files, 300, 50, cifar.CAT_DOG), strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
