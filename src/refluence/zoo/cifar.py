"""CIFAR-10 and its cats and dogs ("cifar2"), from the official archive, unpacked or not, or one file of the two."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refluence.errors import DataError
from refluence.zoo.official_files import Download, Layout, Located, OfficialFile, Source

MEAN = STD = 0.5
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CAT_DOG = (3, 5)
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCH = "test_batch"
BATCH_FOLDER, ARCHIVE, CAT_DOG_FILE = "cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar2_cat_dog.npz"
Batch = tuple[np.ndarray, np.ndarray]

_ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
_OFFICIAL = (
    Layout(
        (BATCH_FOLDER, f"cifar10/{BATCH_FOLDER}", "cifar10"),
        (
            OfficialFile("data_batch_1", "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd"),
            OfficialFile("data_batch_2", "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8"),
            OfficialFile("data_batch_3", "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9"),
            OfficialFile("data_batch_4", "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b"),
            OfficialFile("data_batch_5", "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154"),
            OfficialFile(TEST_BATCH, "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831"),
        ),
    ),
    Layout(("cifar10", "."), (OfficialFile(ARCHIVE, _ARCHIVE_SHA256),)),
)
_DOWNLOADS = (
    Download(
        ARCHIVE,
        _ARCHIVE_SHA256,
        170_498_071,
        ("https://www.cs.toronto.edu/~kriz/", "https://storage.googleapis.com/tensorflow/tf-keras-datasets/"),
    ),
)
_TORCHVISION = f"Set {{data}} to the `root` of torchvision's CIFAR10, which has `{BATCH_FOLDER}/`."

CIFAR10 = Source(
    name="cifar10",
    title="CIFAR-10",
    layouts=_OFFICIAL,
    downloads=_DOWNLOADS,
    folder="cifar10",
    ways=(f"Set {{data}} to a folder with the official `{ARCHIVE}`, in it or in its `cifar10/`.", _TORCHVISION),
)

CIFAR2 = Source(
    name="cifar2",
    title="CIFAR-2 (the cats and dogs of CIFAR-10)",
    layouts=(
        Layout(
            ("cifar2_cat_dog", "cifar2", "."),
            (OfficialFile(CAT_DOG_FILE, "ff247a2de07621e51b3e8222e837d81ea61fa4237a4ccd7aa611b70fccf922b8"),),
        ),
        *_OFFICIAL,
    ),
    downloads=_DOWNLOADS,
    folder="cifar10",
    ways=(
        f"Set {{data}} to a folder with `cifar2_cat_dog/{CAT_DOG_FILE}`, or with the official `{ARCHIVE}`.",
        _TORCHVISION,
    ),
)


def load(
    files: Located, train: int, test: int, classes: tuple[int, ...] | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The first `train` and `test` images, (n, 3, 32, 32) as (pixel/255 − 0.5)/0.5, and their labels (n,).

    Args:
        files: of CIFAR-10, or the cats and dogs.
        train: rows after filtering, in the official order.
        test: the same for the test rows.
        classes: keep only these, labelled by their place here.

    Raises:
        DataError: a file is not the published one, or more rows asked than there are.
    """
    name = files.source.name
    if files.holds(CAT_DOG_FILE):
        arrays = np.load(io.BytesIO(files.read(CAT_DOG_FILE)), allow_pickle=False)
        parts = [[(arrays[f"{part}_x"].transpose(0, 3, 1, 2), arrays[f"{part}_y"])] for part in ("train", "test")]
        return _pair(parts[0], train, f"{name} train"), _pair(parts[1], test, f"{name} test")
    batches = _Batches(files)
    return (
        _pair(_chosen(map(batches.read, TRAIN_BATCHES), classes), train, f"{name} train"),
        _pair(_chosen(map(batches.read, (TEST_BATCH,)), classes), test, f"{name} test"),
    )


class _Batches:
    """The official batches, from their folder or from the archive, which is unpacked in memory."""

    def __init__(self, files: Located) -> None:
        self._files = files
        self._archive: tarfile.TarFile | None = None
        if files.holds(ARCHIVE):
            self._archive = tarfile.TarFile(fileobj=io.BytesIO(gzip.decompress(files.read(ARCHIVE))))

    def read(self, name: str) -> Batch:
        """Images (n, 3, 32, 32) of bytes and labels (n,) of a batch."""
        batch = _unpickle(self._content(name))
        return np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32), np.asarray(batch[b"labels"])

    def _content(self, name: str) -> bytes:
        if self._archive is None:
            return self._files.read(name)
        member = self._archive.extractfile(f"{BATCH_FOLDER}/{name}")
        if member is None:
            raise DataError(f"{self._files.folder / ARCHIVE} has no file {BATCH_FOLDER}/{name}")
        return member.read()


class _Unpickler(pickle.Unpickler):
    """Reads what the official files hold, numbers in numpy arrays; a pickle could else run any program."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return super().find_class("numpy._core.multiarray", name)
        raise DataError(f"a batch of CIFAR-10 holds no {module}.{name}: it is not read")


def _unpickle(content: bytes) -> dict[bytes, Any]:
    return _Unpickler(io.BytesIO(content), encoding="bytes").load()


def _chosen(batches: Iterable[Batch], classes: tuple[int, ...] | None) -> Iterator[Batch]:
    for images, labels in batches:
        if classes is None:
            yield images, labels
        else:
            rows = np.isin(labels, classes)
            yield images[rows], np.array([classes.index(label) for label in labels[rows]], np.int64)


def _pair(batches: Iterable[Batch], rows: int, what: str) -> tuple[Tensor, Tensor]:
    """The first rows of batches, of which only as many as they need are read."""
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    have = 0
    for x, y in batches:
        images.append(x[: rows - have] if rows > 0 else x)
        labels.append(y[: rows - have] if rows > 0 else y)
        have += len(labels[-1])
        if have == rows:
            break
    if have != rows:
        raise DataError(f"{what} has {have:,} rows; {rows:,} cannot be taken: ask for 1 to {have:,}")
    pixels = torch.from_numpy(np.concatenate(images))
    return pixels.float().div_(255).sub_(MEAN).div_(STD), torch.from_numpy(np.concatenate(labels)).long()
