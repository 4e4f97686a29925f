"""MNIST: found on this machine and verified, or downloaded when asked to, never silently."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from refluence.errors import DataError
from refluence.progress import track
from refluence.zoo.folders import DATA_VARIABLE, data_folders
from refluence.zoo.idx import read_idx

NAME = "mnist"
MEAN, STD = 0.1307, 0.3081
PUBLISHED_TRAIN, PUBLISHED_TEST = 5_000, 500
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


@dataclass(frozen=True)
class OfficialFile:
    """One of the four files as published: its name without `.gz`, the SHA-256 of both forms, its gzipped size."""

    name: str
    gzipped: str
    unpacked: str
    size: int


FILES = (
    OfficialFile(
        "train-images-idx3-ubyte",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        9_912_422,
    ),
    OfficialFile(
        "train-labels-idx1-ubyte",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        28_881,
    ),
    OfficialFile(
        "t10k-images-idx3-ubyte",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        1_648_877,
    ),
    OfficialFile(
        "t10k-labels-idx1-ubyte",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        4_542,
    ),
)


def _form_in(folder: Path, file: OfficialFile) -> Path | None:
    """The gzipped or unpacked form of a file in a folder."""
    candidates = (folder / f"{file.name}.gz", folder / file.name)
    return next((path for path in candidates if path.is_file()), None)


def find() -> Path | None:
    """The first folder that holds all four files, gzipped or unpacked; None if there is none."""
    return next((f for f in data_folders(NAME) if all(_form_in(f, file) for file in FILES)), None)


def verified(folder: Path) -> list[Path]:
    """The paths of the official files in a folder.

    Raises:
        DataError: a file is missing, or its SHA-256 is not the published one.
    """
    paths = []
    for file in FILES:
        path = _form_in(folder, file)
        if path is None:
            raise DataError(f"{folder} has neither {file.name}.gz nor {file.name}")
        expected = file.gzipped if path.suffix == ".gz" else file.unpacked
        with path.open("rb") as opened:
            got = hashlib.file_digest(opened, "sha256").hexdigest()
        if got != expected:
            raise DataError(
                f"{path} is not the published file: SHA-256 expected {expected}, got {got}. "
                f"Delete it and run `refluence data fetch {NAME}`"
            )
        paths.append(path)
    return paths


def missing() -> DataError:
    """The error that says the three ways to get MNIST."""
    places = "\n".join(f"     {folder}" for folder in data_folders(NAME))
    return DataError(
        "MNIST was not found on this machine, and nothing is downloaded unasked. Three ways to get it:\n"
        f"  1. `refluence data fetch {NAME}` downloads it once (11.6 MB, checksums verified).\n"
        f"  2. Set ${DATA_VARIABLE} to a folder with `mnist/` holding the four official IDX files, .gz or unpacked.\n"
        f"  3. Set ${DATA_VARIABLE} to the `root` of torchvision's MNIST, which has `MNIST/raw/`.\n"
        f"Looked in:\n{places}"
    )


def fetch(*, progress: bool = True) -> Path:
    """Download the four files into the cache from the first mirror that gives them; files already right are kept.

    Returns:
        The folder.

    Raises:
        DataError: no mirror gave a file with the published SHA-256.
    """
    import pooch

    folder = data_folders(NAME)[-1]
    for file in track(FILES, "downloading MNIST", enabled=progress):
        failures = []
        for mirror in MIRRORS:
            try:
                pooch.retrieve(
                    f"{mirror}{file.name}.gz",
                    known_hash=f"sha256:{file.gzipped}",
                    fname=f"{file.name}.gz",
                    path=folder,
                    downloader=pooch.HTTPDownloader(timeout=60),
                )
                break
            except (OSError, ValueError) as error:  # network trouble, or a checksum that differs
                failures.append(f"  {mirror}{file.name}.gz: {error}")
        else:
            raise DataError(f"{file.name}.gz could not be downloaded:\n" + "\n".join(failures))
    return folder


def load(train: int = PUBLISHED_TRAIN, test: int = PUBLISHED_TEST) -> tuple[tuple[Tensor, Tensor], ...]:
    """The first `train` and `test` images, (n, 1, 28, 28) normalised by the published mean and deviation, and labels.

    Raises:
        DataError: the set is not on this machine, a file is not the published one, or more rows asked than there are.
    """
    folder = find()
    if folder is None:
        raise missing()
    train_x, train_y, test_x, test_y = verified(folder)
    return _pair(train_x, train_y, train), _pair(test_x, test_y, test)


def _pair(images: Path, labels: Path, rows: int) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(read_idx(images, rows).copy())[:, None].float().div_(255).sub_(MEAN).div_(STD)
    return x, torch.from_numpy(read_idx(labels, rows).copy()).long()
