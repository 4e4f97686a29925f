"""MAESTRO v2.0.0 as windows of musical events: 256 in a row, in the order of the files' names."""

from __future__ import annotations

import csv
import hashlib
import io
import zipfile
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from refluence.errors import DataError
from refluence.progress import track
from refluence.zoo.midi_events import encode
from refluence.zoo.midi_notes import read_notes, symusic
from refluence.zoo.official_files import Download, Layout, Located, OfficialFile, Source
from refluence.zoo.token_cache import cached
from refluence.zoo.token_windows import windows

WINDOW = 256
FOLDER, TABLE, ARCHIVE = "maestro-v2.0.0", "maestro-v2.0.0.csv", "maestro-v2.0.0-midi.zip"
_FORMAT = 1
_ARCHIVE_SHA256 = "ec2cc9d94886c6b376db1eaa2b8ad1ce62ff9f0a28b3744782b13163295dadf3"


@dataclass(frozen=True)
class Performances:
    """The MIDI files that are here of one split, and how many it has in all.

    Attributes:
        names: as in the official table, sorted by the file's own name (the order of the published benchmark).
        total: in the official table.
        archive: the zip that they are in; None where they lie in the folder of `files`.
        files: where they are.
    """

    names: tuple[str, ...]
    total: int
    archive: zipfile.ZipFile | None
    files: Located

    def read(self, name: str) -> bytes:
        """The content of a MIDI file.

        Raises:
            DataError: it cannot be read.
        """
        try:
            if self.archive is not None:
                return self.archive.read(f"{FOLDER}/{name}")
            return (self.files.folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"{self.files.folder / name} cannot be read: {error}") from error

    def fingerprint(self, rows: int) -> str:
        """A hash of these files' names and contents, of how they become events, and of the number of rows wanted."""
        digest = hashlib.sha256(f"{_FORMAT} {WINDOW} {rows}".encode())
        for name in self.names:
            digest.update(name.encode())
            digest.update(_ARCHIVE_SHA256.encode() if self.archive else hashlib.sha256(self.read(name)).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class Music:
    """Windows of events (n, 256) with what comes next (n, 256), and how many performances are here, in words."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    present: dict[str, str]


def load(files: Located, train: int, test: int, *, progress: bool = True) -> Music:
    """The first windows of the train and of the test split; only as many files are read as they need.

    Windows do not overlap, start with a performance's first event, and a rest that is shorter is left out.

    Raises:
        DataError: a file is not the published one or not MIDI, more windows asked than there are, no symusic.
    """
    parts = performances(files)
    return Music(
        train=_windows(parts["train"], train, "train", progress),
        test=_windows(parts["test"], test, "test", progress),
        present={name: _present(part) for name, part in parts.items()},
    )


def performances(files: Located) -> dict[str, Performances]:
    """The performances that are here, for each of the splits "train", "validation" and "test".

    Raises:
        DataError: a file is not the published one.
    """
    if files.holds(ARCHIVE):
        archive = zipfile.ZipFile(io.BytesIO(files.read(ARCHIVE)))
        here = {name.removeprefix(f"{FOLDER}/") for name in archive.namelist()}
        table = archive.read(f"{FOLDER}/{TABLE}")
    else:
        archive, table = None, files.read(TABLE)
        here = {path.relative_to(files.folder).as_posix() for path in files.folder.glob("*/*.midi")}
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for row in csv.DictReader(io.StringIO(table.decode())):
        splits[row["split"]].append(row["midi_filename"])
    return {
        split: Performances(
            tuple(sorted((name for name in names if name in here), key=lambda name: name.rsplit("/", 1)[-1])),
            len(names),
            archive,
            files,
        )
        for split, names in splits.items()
    }


def _contents(files: Located) -> str:
    symusic()
    parts = performances(files)
    for split in ("train", "test"):
        if not parts[split].names:
            raise DataError(f"{files.folder} has the table of MAESTRO but no MIDI file of the {split} split")
    here, total = sum(len(part.names) for part in parts.values()), sum(part.total for part in parts.values())
    verified = "checksum verified" if files.holds(ARCHIVE) else "checksum of the table verified"
    return f"{here:,} of {total:,} performances; {verified}"


def _present(part: Performances) -> str:
    return f"{len(part.names):,} of its {part.total:,} performances are here"


def _windows(part: Performances, rows: int, split: str, progress: bool) -> tuple[Tensor, Tensor]:
    tokens = cached(f"maestro-{split}", part.fingerprint(rows), lambda: _rows(part, rows, split, progress))
    return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy())


def _rows(part: Performances, rows: int, split: str, progress: bool) -> Int64[np.ndarray, "n t"]:
    """The first windows with the event after each."""
    found: list[np.ndarray] = []
    have = 0
    for name in track(part.names, f"MAESTRO {split}: MIDI to events", enabled=progress):
        events = encode(read_notes(part.read(name), str(part.files.folder / name)))
        inputs, targets = windows(torch.from_numpy(events), WINDOW)
        found.append(np.concatenate([inputs.numpy(), targets[:, -1:].numpy()], axis=1))
        have += len(inputs)
        if 0 < rows <= have:
            return np.concatenate(found)[:rows]
    raise DataError(
        f"maestro {split} has {have:,} windows ({_present(part)}); {rows:,} cannot be taken: ask for 1 to {have:,}"
    )


MAESTRO = Source(
    name="maestro",
    title="MAESTRO v2.0.0",
    layouts=(
        Layout(
            (FOLDER, f"maestro/{FOLDER}", f"{FOLDER}-subset", "maestro"),
            (OfficialFile(TABLE, "b29131ce89a49df044c54974d11d9977dc7bc53d35aeb39b4d3747f59a34092d"),),
        ),
        Layout(("maestro", "."), (OfficialFile(ARCHIVE, _ARCHIVE_SHA256),)),
    ),
    downloads=(
        Download(
            ARCHIVE,
            _ARCHIVE_SHA256,
            59_243_107,
            ("https://storage.googleapis.com/magentadata/datasets/maestro/v2.0.0/",),
        ),
    ),
    folder="maestro",
    ways=(
        f"Set {{data}} to a folder with the official `{ARCHIVE}`, in it or in its `maestro/`.",
        f"Set {{data}} to the folder where that was unpacked, which has `{FOLDER}/` with `{TABLE}` and "
        "all or some of the MIDI files.",
    ),
    contents=_contents,
)
