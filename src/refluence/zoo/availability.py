"""Which data sets of the zoo are on this machine, and getting one that is not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from refluence.errors import DataError
from refluence.zoo import mnist
from refluence.zoo.datasets import dataset_names


@dataclass(frozen=True)
class Availability:
    """Whether a data set can be loaded, where its files are (None where it comes with a package), and what is wrong."""

    name: str
    available: bool
    folder: Path | None
    detail: str


def availability(name: str) -> Availability:
    """Look for a data set and verify its checksums; nothing is downloaded.

    Raises:
        DataError: an unknown name.
    """
    check_name(name)
    if name != mnist.NAME:
        return Availability(name, True, None, "comes with scikit-learn")
    folder = mnist.find()
    if folder is None:
        return Availability(name, False, None, f"not found; `refluence data fetch {name}` downloads it")
    try:
        mnist.verified(folder)
    except DataError as error:
        return Availability(name, False, folder, str(error))
    return Availability(name, True, folder, "checksums verified")


def fetch_dataset(name: str, *, progress: bool = True) -> Availability:
    """Download a data set into the cache unless it is on this machine already, with the right checksums.

    Raises:
        DataError: an unknown name, no mirror gave the right files, or the files found first are damaged.
    """
    found = availability(name)
    if found.available:
        return found
    mnist.fetch(progress=progress)
    found = availability(name)
    if not found.available:
        raise DataError(found.detail)
    return found


def check_name(name: str) -> None:
    """Raise a DataError that lists the known names unless the zoo has this data set."""
    if name not in dataset_names():
        raise DataError(f"unknown data set {name!r}: use one of {', '.join(dataset_names())}")
