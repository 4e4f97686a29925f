"""Where a store is: a folder, or what a URL of fsspec names. Objects are whole there or not there."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import fsspec

from refluence.errors import StoreError
from refluence.execution import format_bytes
from refluence.files import replacing

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_ATTEMPTS = 2


@runtime_checkable
class Place(Protocol):
    """Named objects, and places below by name."""

    def names(self) -> list[str]:
        """Of the objects, sorted."""

    def below(self, part: str) -> Place:
        """The place of that name, or this one for ""."""

    def parts(self) -> list[str]:
        """Names of the places below, sorted."""

    def open(self, name: str) -> io.IOBase:
        """An object, for reading anywhere in it."""

    def write(self, name: str, data: bytes) -> None:
        """Write an object in one step."""

    def remove(self, name: str) -> None:
        """Remove an object, which may be gone already."""

    def about(self, name: str) -> tuple[int, float | None]:
        """(bytes, seconds since 1970 when it was written, None where this is not known)."""


class LocalFolder:
    """A folder, which is made when something is written.

    Raises:
        StoreError: there is a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(self, "the folder"):
            a_file = path.exists() and not path.is_dir()
        if a_file:
            raise StoreError(f"the store {path} is a file: give a folder")

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        """Of the files, sorted."""
        with _reading(self, "its files"):
            return sorted(entry.name for entry in self.path.iterdir() if entry.is_file()) if self.path.exists() else []

    def below(self, part: str) -> LocalFolder:
        """A folder in this one."""
        return LocalFolder(self.path / part)

    def parts(self) -> list[str]:
        """Of the folders, sorted."""
        with _reading(self, "its folders"):
            return sorted(entry.name for entry in self.path.iterdir() if entry.is_dir()) if self.path.exists() else []

    def open(self, name: str) -> io.IOBase:
        """A file, for reading."""
        with _reading(self, name):
            return (self.path / name).open("rb")

    def write(self, name: str, data: bytes) -> None:
        """Write a file under a temporary name, have it on the disk, and rename it."""
        with _writing(self, name, len(data)):
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    with replacing(self.path / name) as temporary:
                        temporary.write_bytes(data)
                    return
                except FileNotFoundError:  # somebody pruned the temporary file
                    if attempt == _ATTEMPTS:
                        raise

    def remove(self, name: str) -> None:
        """Remove a file, which may be gone already."""
        with _writing(self, name, 0):
            (self.path / name).unlink(missing_ok=True)

    def about(self, name: str) -> tuple[int, float | None]:
        """(bytes, when it was written)."""
        found = (self.path / name).stat()
        return found.st_size, found.st_mtime


class RemoteFolder:
    """A folder of a file system of fsspec, whose objects are written by one request each."""

    def __init__(self, system: fsspec.AbstractFileSystem, root: str, url: str) -> None:
        self.system, self.root, self.url = system, root.rstrip("/"), url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def names(self) -> list[str]:
        """Of the objects, sorted."""
        return self._listed("file")

    def below(self, part: str) -> RemoteFolder:
        """A folder in this one."""
        return RemoteFolder(self.system, self._path(part), f"{self.url}/{part}") if part else self

    def parts(self) -> list[str]:
        """Of the folders, sorted."""
        return self._listed("directory")

    def _listed(self, kind: str) -> list[str]:
        self.system.invalidate_cache()
        try:
            with _reading(self, "its contents"):
                entries = self.system.ls(self.root, detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == kind)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def open(self, name: str) -> Any:
        """An object, for reading."""
        with _reading(self, name):
            return self.system.open(self._path(name), "rb")

    def write(self, name: str, data: bytes) -> None:
        """Write an object by one request."""
        with _writing(self, name, len(data)):
            self.system.pipe_file(self._path(name), data)

    def remove(self, name: str) -> None:
        """Remove an object, which may be gone already."""
        with _writing(self, name, 0):
            try:
                self.system.rm_file(self._path(name))
            except FileNotFoundError:
                return

    def about(self, name: str) -> tuple[int, float | None]:
        """(bytes, when it was written where the file system says so)."""
        found = self.system.info(self._path(name))
        times = ("LastModified", "last_modified", "created", "mtime")
        when: Any = next((found[key] for key in times if key in found), None)
        seconds = when.timestamp() if hasattr(when, "timestamp") else when
        return int(found["size"]), float(seconds) if isinstance(seconds, (int, float)) else None


def open_place(store: str | os.PathLike[str]) -> LocalFolder | RemoteFolder:
    """The place that a path or URL names; nothing is made.

    Raises:
        StoreError: a path of a file, a scheme that fsspec does not know, or whose package is not installed.
    """
    text = os.fspath(store)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme in ("file", "local"):
        return LocalFolder(Path(rest if separator else text).expanduser())
    try:
        system, root = fsspec.core.url_to_fs(text)
    except ValueError as error:
        raise StoreError(
            f"the store {text} has the scheme {scheme!r}, which fsspec does not know: give a path, or a URL such as "
            "s3://bucket/folder"
        ) from error
    except ImportError as error:
        raise StoreError(f"the store {text} needs a package that is not installed: {error}") from error
    return RemoteFolder(system, root, text)


@contextmanager
def _reading(place: object, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _REFUSED or isinstance(error, PermissionError):
            raise StoreError(f"{name} of the store {place} may not be read: give its user the right to") from error
        raise


@contextmanager
def _writing(place: object, name: str, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreError(
                f"there is no room for {name} ({format_bytes(size)}) in the store {place}: what was written before is "
                "kept, and the same fit goes on from there. Free some space, or give another store"
            ) from error
        if error.errno in _REFUSED or isinstance(error, PermissionError):
            raise StoreError(
                f"{name} may not be written to the store {place}: give a store that this user may write to"
            ) from error
        raise StoreError(f"{name} could not be written to the store {place}: {error}") from error
