"""The data sets of the zoo, in memory: "digits" comes with scikit-learn, the others are found or fetched on request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from refluence.errors import DataError
from refluence.zoo import cifar, maestro, midi_events, mnist, shakespeare
from refluence.zoo.official_files import Source, located

Pair = tuple[Tensor, Tensor]

_DIGITS_TEST = 360
_IMAGES_TRAIN, _IMAGES_TEST = 5_000, 500
_MUSIC_TRAIN, _MUSIC_TEST = 5_000, 178
_ALIASES = {"tinyshakespeare": "shakespeare", "tiny_shakespeare": "shakespeare"}


@dataclass(frozen=True)
class ImageFormat:
    """How a row of the inputs is a picture: its shape (channels, height, width), and pixel = x · std + mean in 0…1."""

    shape: tuple[int, int, int]
    mean: float = 0.0
    std: float = 1.0

    def pixels(self, x: Tensor) -> Tensor:
        """The 8-bit pixels of some inputs, uint8 of the same shape; exactly those of a file that had 8 bits."""
        return (x * self.std + self.mean).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class TokenFormat:
    """How a row of the inputs is a sequence of tokens: how many there are, its length, and how it reads as text.

    Attributes:
        vocabulary: tokens are the integers below it.
        length: tokens in a row, and targets (the tokens one place later).
        decode: ids (length,) to text for people.
    """

    vocabulary: int
    length: int
    decode: Callable[[Sequence[int] | Tensor], str]


@dataclass(frozen=True)
class DataSplit:
    """A data set in memory, of images or of sequences of tokens; `image` or `tokens` says which.

    Attributes:
        name: as in `load_dataset`.
        train: images (n, channels, height, width) float32 and their labels (n,) int64, or tokens (n, length) and the
            tokens that come next (n, length), both int64.
        test: the same for the test rows.
        class_names: of the labels; empty for tokens.
        image: what the pixels are; None for tokens.
        tokens: what the tokens are; None for images.
        provenance: what it is, where it comes from, and which rows these are.
    """

    name: str
    train: Pair
    test: Pair
    class_names: tuple[str, ...]
    image: ImageFormat | None
    provenance: str
    tokens: TokenFormat | None = None


def load_dataset(
    name: str, *, n_train: int | None = None, n_test: int | None = None, progress: bool = True
) -> DataSplit:
    """A data set of the zoo by name, the same rows in the same order every time; nothing is downloaded.

    Args:
        name: "digits" (1,437 train and 360 test images of 8×8); "mnist", "fashion_mnist", "cifar10", "cifar2" (its cats
            and dogs; the published benchmarks: the first 5,000 train and 500 test images); "maestro" (the first 5,000
            windows of 256 musical events, and 178 of the test split); "shakespeare" (3,921 and 435 blocks of 256
            characters).
        n_train: take the first so many train rows instead, up to the whole set.
        n_test: the same for the test rows.
        progress: show how far the reading of many files is.

    Raises:
        DataError: an unknown name, a set that is not on this machine, a wrong checksum, more rows than there are.
    """
    known = canonical_name(name)
    if known == "maestro":
        return _maestro(n_train, n_test, progress=progress)
    return _LOADERS[known](n_train, n_test)


def dataset_names() -> tuple[str, ...]:
    """The names that `load_dataset` knows."""
    return tuple(_LOADERS)


def canonical_name(name: str) -> str:
    """The name of a data set, of itself or of another spelling ("tinyshakespeare").

    Raises:
        DataError: an unknown name.
    """
    known = _ALIASES.get(name, name)
    if known not in _LOADERS:
        raise DataError(f"unknown data set {name!r}: use one of {', '.join(dataset_names())}")
    return known


def source_of(name: str) -> Source | None:
    """Where a data set comes from; None for the one that scikit-learn has.

    Raises:
        DataError: an unknown name.
    """
    return _SOURCES.get(canonical_name(name))


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


def _idx_images(
    source: Source,
    origin: str,
    class_names: tuple[str, ...],
    scale: tuple[float, float],
    n_train: int | None,
    n_test: int | None,
) -> DataSplit:
    train, test = mnist.load(located(source), _or(n_train, _IMAGES_TRAIN), _or(n_test, _IMAGES_TEST), scale)
    return DataSplit(
        name=source.name,
        train=train,
        test=test,
        class_names=class_names,
        image=ImageFormat((1, 28, 28), *scale),
        provenance=f"{origin}: {_first_images(train, test)}, normalised by mean {scale[0]} and deviation {scale[1]}",
    )


def _colour_images(
    source: Source, origin: str, classes: tuple[int, ...] | None, n_train: int | None, n_test: int | None
) -> DataSplit:
    train, test = cifar.load(located(source), _or(n_train, _IMAGES_TRAIN), _or(n_test, _IMAGES_TEST), classes)
    return DataSplit(
        name=source.name,
        train=train,
        test=test,
        class_names=cifar.CLASSES if classes is None else tuple(cifar.CLASSES[label] for label in classes),
        image=ImageFormat((3, 32, 32), cifar.MEAN, cifar.STD),
        provenance=f"{origin}: {_first_images(train, test)}, normalised by mean and deviation {cifar.MEAN}",
    )


def _maestro(n_train: int | None, n_test: int | None, *, progress: bool = True) -> DataSplit:
    music = maestro.load(
        located(maestro.MAESTRO), _or(n_train, _MUSIC_TRAIN), _or(n_test, _MUSIC_TEST), progress=progress
    )
    return DataSplit(
        name="maestro",
        train=music.train,
        test=music.test,
        class_names=(),
        image=None,
        tokens=TokenFormat(midi_events.VOCABULARY, maestro.WINDOW, midi_events.describe),
        provenance=(
            f"MAESTRO v2.0.0 (C. Hawthorne et al.) as events of 10 ms steps: the first {len(music.train[0]):,} windows "
            f"of {maestro.WINDOW} events of the train split ({music.present['train']}) and the first "
            f"{len(music.test[0]):,} of the test split ({music.present['test']}), because the generated pieces of the "
            "published test set are not public"
        ),
    )


def _shakespeare(n_train: int | None, n_test: int | None) -> DataSplit:
    train, test, vocabulary = shakespeare.load(located(shakespeare.SHAKESPEARE))
    train, test = _first(train, n_train, "shakespeare train"), _first(test, n_test, "shakespeare test")
    return DataSplit(
        name="shakespeare",
        train=train,
        test=test,
        class_names=(),
        image=None,
        tokens=TokenFormat(len(vocabulary), shakespeare.BLOCK, partial(shakespeare.text_of, vocabulary)),
        provenance=(
            f"Tiny Shakespeare (A. Karpathy): the first {len(train[0]):,} blocks of {shakespeare.BLOCK} characters of "
            f"the first nine tenths, and the first {len(test[0]):,} of the rest"
        ),
    )


def _first_images(train: Pair, test: Pair) -> str:
    return f"the first {len(train[1]):,} train and {len(test[1]):,} test images in the original order"


def _or(rows: int | None, published: int) -> int:
    return published if rows is None else rows


def _first(pair: Pair, rows: int | None, what: str) -> Pair:
    total = len(pair[1])
    wanted = total if rows is None else rows
    if not 0 < wanted <= total:
        raise DataError(f"{what} has {total:,} rows; {wanted:,} cannot be taken: ask for 1 to {total:,}")
    return pair[0][:wanted], pair[1][:wanted]


_DIGIT_NAMES = tuple(str(digit) for digit in range(10))
_LOADERS: dict[str, Callable[[int | None, int | None], DataSplit]] = {
    "digits": _digits,
    "mnist": partial(_idx_images, mnist.MNIST, "MNIST (Y. LeCun and C. Cortes)", _DIGIT_NAMES, mnist.MNIST_SCALE),
    "fashion_mnist": partial(
        _idx_images, mnist.FASHION_MNIST, "Fashion-MNIST (H. Xiao et al.)", mnist.FASHION_CLASSES, mnist.FASHION_SCALE
    ),
    "cifar10": partial(_colour_images, cifar.CIFAR10, "CIFAR-10 (A. Krizhevsky)", None),
    "cifar2": partial(_colour_images, cifar.CIFAR2, "The cats and dogs of CIFAR-10 (A. Krizhevsky)", cifar.CAT_DOG),
    "maestro": _maestro,
    "shakespeare": _shakespeare,
}
_SOURCES = {
    source.name: source
    for source in (
        mnist.MNIST,
        mnist.FASHION_MNIST,
        cifar.CIFAR10,
        cifar.CIFAR2,
        maestro.MAESTRO,
        shakespeare.SHAKESPEARE,
    )
}
