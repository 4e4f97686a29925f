"""Tokens that took long to make, in the cache: one file each, named by a fingerprint of all that made it."""

from __future__ import annotations

import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from refluence.files import replacing
from refluence.zoo.folders import cache_folder

SLOW_SECONDS = 2.0


def cached(name: str, fingerprint: str, make: Callable[[], Int64[np.ndarray, "n t"]]) -> Int64[np.ndarray, "n t"]:
    """What `make()` gives: from the cache, or made now, and kept there if that took more than two seconds."""
    path = cache_folder() / "tokens" / f"{name}-{fingerprint[:16]}.npz"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                return file["tokens"].astype(np.int64)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            warnings.warn(f"{path} is damaged ({error}): made again", stacklevel=2)
    begin = time.monotonic()
    tokens = make()
    if time.monotonic() - begin > SLOW_SECONDS or path.is_file():
        _save(path, tokens)
    return tokens


def _save(path: Path, tokens: np.ndarray) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, tokens=tokens.astype(np.int16))
