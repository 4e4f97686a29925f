"""Where the zoo keeps and looks for files: the cache (`$REFLUENCE_CACHE`) and the user's data (`$REFLUENCE_DATA`)."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "REFLUENCE_CACHE"
DATA_VARIABLE = "REFLUENCE_DATA"


def cache_folder() -> Path:
    """`$REFLUENCE_CACHE`, else the operating system's cache folder for refluence; it need not exist."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    import pooch

    return Path(pooch.os_cache("refluence"))


def checkpoint_folder() -> Path:
    """Where trained models of the zoo are kept."""
    return cache_folder() / "checkpoints"


def download_folder() -> Path:
    """Where data sets are downloaded to."""
    return cache_folder() / "data"


def data_roots() -> list[Path]:
    """Where data sets are looked for, in order: `$REFLUENCE_DATA` if it is set, then what was downloaded."""
    chosen = os.environ.get(DATA_VARIABLE)
    return [*([Path(chosen).expanduser()] if chosen else []), download_folder()]
