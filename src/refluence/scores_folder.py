"""Scores as a folder: a zarr group of values, errors and ids, with the manifest as its attributes and as JSON."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from refluence._version import __version__
from refluence.errors import DataError

FORMAT_NAME = "refluence-scores-"
FORMAT = FORMAT_NAME + "1"
MANIFEST = "manifest.json"


@contextmanager
def replacing_scores(path: Path) -> Iterator[Path]:
    """A folder beside `path` that is moved there when the block ends well; one is replaced only if it holds scores.

    Raises:
        DataError: the path holds something else.
    """
    if path.exists() and not holds_scores(path):
        raise DataError(f"{path} exists and holds no scores: choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield beside
        if path.exists():
            shutil.rmtree(path)
        beside.rename(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    path.chmod(0o755)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the manifest, with format and version, into the group's attributes and as a file.

    Raises:
        DataError: it is not JSON.
    """
    record = {**record, "format": FORMAT, "refluence": __version__}
    try:
        text = json.dumps(record, indent=2) + "\n"
    except TypeError as error:
        raise DataError(f"the manifest of the scores cannot be written as JSON: {error}") from error
    zarr.open_group(str(folder), mode="a").attrs["manifest"] = record
    (folder / MANIFEST).write_text(text)


def write_ids(group: Any, name: str, ids: NDArray) -> None:
    """Write ids: numbers as an array, names as an attribute."""
    if ids.dtype.kind in "OU":
        group.attrs[name] = [str(item) for item in ids]
    else:
        group.create_array(name, data=ids)


def read_ids(group: Any, name: str) -> NDArray:
    """What `write_ids` wrote."""
    return np.asarray(group.attrs[name]) if name in group.attrs else group[name][...]


def open_scores(path: Path) -> tuple[Any, dict[str, Any]]:
    """(zarr group, manifest) of a folder of scores.

    Raises:
        DataError: the path holds no scores, or of another format.
    """
    if not holds_scores(path):
        raise DataError(f"{path} holds no scores: it should be a directory that Scores.save wrote")
    group: Any = zarr.open_group(str(path), mode="r")
    manifest = dict(group.attrs["manifest"])
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path} has format {manifest.get('format')!r}, this version reads {FORMAT!r}")
    return group, manifest


def holds_scores(path: Path) -> bool:
    """Whether a directory is what `Scores.save` wrote, in this or another format version."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    named = isinstance(manifest, dict) and str(manifest.get("format", "")).startswith(FORMAT_NAME)
    return named and (path / "zarr.json").exists()
