"""Which data sets of the zoo are on this machine, and getting one that is not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from refluence.errors import DataError
from refluence.zoo.datasets import source_of
from refluence.zoo.folders import download_folder
from refluence.zoo.official_files import fetch, locate


@dataclass(frozen=True)
class Availability:
    """Whether a data set can be loaded, and from where.

    Attributes:
        name: as in `load_dataset`.
        available: it can.
        folder: of its files; None where there are none, or where it comes with a package.
        detail: what is there, or what is wrong.
        download: bytes that `fetch_dataset` downloads; 0 where it comes with a package.
    """

    name: str
    available: bool
    folder: Path | None
    detail: str
    download: int


def availability(name: str) -> Availability:
    """Look for a data set and verify its checksums; nothing is downloaded.

    Raises:
        DataError: an unknown name.
    """
    source = source_of(name)
    if source is None:
        return Availability(name, True, None, "comes with scikit-learn", 0)
    found = locate(source)
    if found is None:
        return Availability(
            source.name, False, None, f"not found; `refluence data fetch {source.name}` downloads it", source.size
        )
    try:
        return Availability(source.name, True, found.folder, found.verify(), source.size)
    except DataError as error:
        return Availability(source.name, False, found.folder, str(error), source.size)


def fetch_dataset(name: str, *, progress: bool = True) -> Availability:
    """Download a data set into the cache unless it is on this machine already, with the right checksums.

    Raises:
        DataError: an unknown name, no mirror gave the right files, or the user's own files, which go before the cache,
            cannot be used.
    """
    source = source_of(name)
    found = availability(name)
    if found.available or source is None:
        return found
    if found.folder is not None and not found.folder.is_relative_to(download_folder()):
        raise DataError(found.detail)
    fetch(source, progress=progress)
    found = availability(name)
    if not found.available:
        raise DataError(found.detail)
    return found
