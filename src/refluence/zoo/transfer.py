"""Downloading one file over HTTP, going on where a broken connection stopped."""

from __future__ import annotations

import http.client
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from refluence.progress import track

CHUNK = 1 << 18
ATTEMPTS = 5
TIMEOUT = 60


def transfer(size: int, description: str, *, progress: bool = True) -> Callable[[str, str, Any], None]:
    """A downloader for `pooch.retrieve` of a file of `size` bytes.

    A connection that breaks is opened again for the rest, up to five times in a row without a byte. Raises OSError
    where the server does not answer or refuses.
    """

    def download(url: str, path: str, _: Any) -> None:
        with Path(path).open("wb") as file:
            chunks = _chunks(url, size)
            for chunk in track(chunks, description, total=math.ceil(size / CHUNK), enabled=progress):
                file.write(chunk)

    return download


def _chunks(url: str, size: int) -> Iterator[bytes]:
    have, attempts = 0, 0
    while have < size and attempts < ATTEMPTS:
        attempts += 1
        try:
            for chunk in _rest(url, have):
                have += len(chunk)
                attempts = 0
                yield chunk
        except urllib.error.HTTPError as error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                return  # a file that is shorter than the published one: the checksum will say so
            raise
        except (OSError, http.client.HTTPException) as error:
            if attempts == ATTEMPTS:
                raise OSError(str(error)) from error


def _rest(url: str, start: int) -> Iterator[bytes]:
    """The bytes of a file from `start` on; a server that ignores the request for a part is read from its beginning."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if start and response.status != http.client.PARTIAL_CONTENT:
            _skip(response, start)
        while chunk := response.read(CHUNK):
            yield chunk


def _skip(response: Any, count: int) -> None:
    while count > 0:
        read = len(response.read(min(CHUNK, count)))
        if read == 0:
            raise OSError("the connection broke before the part that was missing")
        count -= read
