"""The data sets of the zoo, in memory: "digits" comes with scikit-learn, "mnist" is found or fetched on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from refluence.errors import DataError
from refluence.zoo import mnist

Pair = tuple[Tensor, Tensor]
_DIGITS_TEST = 360


@dataclass(frozen=True)
class ImageFormat:
    """How a row of the inputs is a picture: its shape (channels, height, width), and pixel = x · std + mean in 0…1."""

    shape: tuple[int, int, int]
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class DataSplit:
    """A data set in memory: inputs (n, channels, height, width) and integer labels (n,) of train and test rows."""

    name: str
    train: Pair
    test: Pair
    class_names: tuple[str, ...]
    image: ImageFormat
    provenance: str


def load_dataset(name: str, *, n_train: int | None = None, n_test: int | None = None) -> DataSplit:
    """A data set of the zoo by name, the same rows in the same order every time; nothing is downloaded.

    Args:
        name: "digits" (1,437 train and 360 test images of 8×8) or "mnist" (the published benchmark: the first
            5,000 train and 500 test images).
        n_train: take the first so many train rows instead.
        n_test: the same for the test rows.

    Raises:
        DataError: an unknown name, a set that is not on this machine, a wrong checksum, more rows than there are.
    """
    if name not in _LOADERS:
        raise DataError(f"unknown data set {name!r}: use one of {', '.join(dataset_names())}")
    return _LOADERS[name](n_train, n_test)


def dataset_names() -> tuple[str, ...]:
    """The names that `load_dataset` knows."""
    return tuple(_LOADERS)


def _digits(n_train: int | None, n_test: int | None) -> DataSplit:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).long()
    images = torch.from_numpy(bunch.images).float()[:, None] / 16
    rows = train_test_split(range(len(labels)), test_size=_DIGITS_TEST, stratify=bunch.target, random_state=0)
    train, test = (torch.tensor(sorted(part)) for part in rows)
    return DataSplit(
        name="digits",
        train=_first((images[train], labels[train]), n_train, "digits train"),
        test=_first((images[test], labels[test]), n_test, "digits test"),
        class_names=tuple(str(digit) for digit in range(10)),
        image=ImageFormat((1, 8, 8)),
        provenance=(
            "Optical Recognition of Handwritten Digits (E. Alpaydin and C. Kaynak), the 1,797 images that come with "
            "scikit-learn; stratified split into 1,437 train and 360 test rows, in the original order"
        ),
    )


def _mnist(n_train: int | None, n_test: int | None) -> DataSplit:
    train, test = mnist.load(
        mnist.PUBLISHED_TRAIN if n_train is None else n_train, mnist.PUBLISHED_TEST if n_test is None else n_test
    )
    return DataSplit(
        name="mnist",
        train=train,
        test=test,
        class_names=tuple(str(digit) for digit in range(10)),
        image=ImageFormat((1, 28, 28), mnist.MEAN, mnist.STD),
        provenance=(
            f"MNIST (Y. LeCun and C. Cortes): the first {len(train[1]):,} train and {len(test[1]):,} test images in "
            f"the original order, normalised by mean {mnist.MEAN} and standard deviation {mnist.STD}"
        ),
    )


def _first(pair: Pair, rows: int | None, what: str) -> Pair:
    total = len(pair[1])
    wanted = total if rows is None else rows
    if not 0 < wanted <= total:
        raise DataError(f"{what} has {total:,} rows; {wanted:,} cannot be taken: ask for 1 to {total:,}")
    return pair[0][:wanted], pair[1][:wanted]


_LOADERS: dict[str, Callable[[int | None, int | None], DataSplit]] = {"digits": _digits, mnist.NAME: _mnist}
