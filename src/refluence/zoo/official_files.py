"""Data sets as their publishers gave them: found on this machine and verified, or downloaded when asked to."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from refluence.errors import DataError
from refluence.zoo.folders import DATA_VARIABLE, data_roots, download_folder
from refluence.zoo.transfer import transfer


@dataclass(frozen=True)
class OfficialFile:
    """A file of a data set: its name and the SHA-256 of its content.

    It may lie there gzipped, with `.gz` after its name, by whatever version of gzip: the content counts.
    """

    name: str
    sha256: str


@dataclass(frozen=True)
class Layout:
    """A form in which a data set lies on a disk: files that are all in one folder, and the folders it may be.

    A folder is below each of the places of `folders.data_roots`; an absolute one is where a system package puts it.
    """

    folders: tuple[str, ...]
    files: tuple[OfficialFile, ...]


@dataclass(frozen=True)
class Download:
    """A file as it is downloaded: its name, the SHA-256 and size of the file itself, and addresses that end in `/`."""

    name: str
    sha256: str
    size: int
    mirrors: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Attributes:
        name: as in `load_dataset`.
        title: its name for people.
        layouts: the forms in which it is accepted; in each place the first one is taken.
        downloads: what `refluence data fetch` downloads into `folder`.
        folder: below the folder of downloads; a folder of one of the layouts.
        ways: two sentences, the second and third way to get it.
        contents: what is in verified files, in a few words; raises a DataError where they cannot be used.
    """

    name: str
    title: str
    layouts: tuple[Layout, ...]
    downloads: tuple[Download, ...]
    folder: str
    ways: tuple[str, str]
    contents: Callable[[Located], str] | None = None

    @property
    def size(self) -> int:
        """Bytes that `refluence data fetch` downloads."""
        return sum(download.size for download in self.downloads)


@dataclass(frozen=True)
class Located:
    """The files of a data set in a folder, in one of its layouts; not verified yet."""

    source: Source
    layout: Layout
    folder: Path

    def holds(self, name: str) -> bool:
        """Whether the layout found has a file of this name."""
        return any(file.name == name for file in self.layout.files)

    def read(self, name: str) -> bytes:
        """The content of one of the layout's files.

        Raises:
            DataError: it cannot be read, or its SHA-256 is not the published one.
        """
        file = next(file for file in self.layout.files if file.name == name)
        path = _form_in(self.folder, file) or self.folder / name
        try:
            content = path.read_bytes()
            if path.name != file.name:
                content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be read: {error}. {self._remedy}") from error
        got = hashlib.sha256(content).hexdigest()
        if got != file.sha256:
            raise DataError(
                f"{path} is not the published file: SHA-256 of its content expected {file.sha256}, got {got}. "
                f"{self._remedy}"
            )
        return content

    def verify(self) -> str:
        """What is there, in a few words, after reading every file.

        Raises:
            DataError: a file is not the published one, or something else is wrong.
        """
        for file in self.layout.files:
            self.read(file.name)
        return "checksums verified" if self.source.contents is None else self.source.contents(self)

    @property
    def _remedy(self) -> str:
        return f"Delete it and run `refluence data fetch {self.source.name}`"


def locate(source: Source) -> Located | None:
    """The first place that has all files of one of the layouts; None if there is none. Checksums are not verified."""
    for layout, folder in _places(source):
        if all(_form_in(folder, file) for file in layout.files):
            return Located(source, layout, folder)
    return None


def located(source: Source) -> Located:
    """As `locate`.

    Raises:
        DataError: it is not on this machine; the message says the three ways to get it.
    """
    found = locate(source)
    if found is None:
        raise missing(source)
    return found


def missing(source: Source) -> DataError:
    """The error that says the three ways to get a data set."""
    places = "\n".join(f"     {folder}" for folder in dict.fromkeys(folder for _, folder in _places(source)))
    second, third = source.ways
    return DataError(
        f"{source.title} was not found on this machine, and nothing is downloaded unasked. Three ways to get it:\n"
        f"  1. `refluence data fetch {source.name}` downloads it once "
        f"({source.size / 1e6:.1f} MB, checksums verified).\n"
        f"  2. {second.format(data=f'${DATA_VARIABLE}')}\n"
        f"  3. {third.format(data=f'${DATA_VARIABLE}')}\n"
        f"Looked in:\n{places}"
    )


def fetch(source: Source, *, progress: bool = True) -> Path:
    """Download what is not in the cache already, each file from the first mirror that gives the right one.

    A file appears under its name only when it is whole and its checksum is right.

    Returns:
        The folder.

    Raises:
        DataError: no mirror gave a file with the published SHA-256.
    """
    import pooch

    folder = download_folder() / source.folder
    for download in source.downloads:
        failures = []
        for mirror in download.mirrors:
            try:
                pooch.retrieve(
                    f"{mirror}{download.name}",
                    known_hash=f"sha256:{download.sha256}",
                    fname=download.name,
                    path=folder,
                    downloader=transfer(download.size, f"downloading {download.name}", progress=progress),
                )
                break
            except (OSError, ValueError) as error:  # network trouble, or a checksum that differs
                failures.append(f"  {mirror}{download.name}: {error}")
        else:
            raise DataError(f"{download.name} could not be downloaded:\n" + "\n".join(failures))
    return folder


def _places(source: Source) -> list[tuple[Layout, Path]]:
    return [(layout, root / folder) for root in data_roots() for layout in source.layouts for folder in layout.folders]


def _form_in(folder: Path, file: OfficialFile) -> Path | None:
    candidates = (folder / file.name, folder / f"{file.name}.gz")
    return next((path for path in candidates if path.is_file()), None)
