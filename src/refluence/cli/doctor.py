"""`refluence doctor`: what this machine has."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refluence.cli.explanation import versions
from refluence.zoo import dataset_names
from refluence.zoo.availability import availability
from refluence.zoo.folders import CACHE_VARIABLE, DATA_VARIABLE, cache_folder, checkpoint_folder


def print_report(console: Console) -> None:
    """Print versions, devices, memory, caches and data."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in [*versions().items(), *_machine(), *_caches(), *_data()]:
        table.add_row(name, escape(value))
    console.print(table)


def _machine() -> list[tuple[str, str]]:
    memory = psutil.virtual_memory()
    return [
        ("memory", f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB of it free"),
        ("devices", ", ".join(["cpu", *_accelerators()])),
        ("dask", _dask()),
    ]


def _dask() -> str:
    """What `--scheduler` needs."""
    try:
        return f"{metadata.version('dask')}, distributed {metadata.version('distributed')}"
    except metadata.PackageNotFoundError:
        return "not installed; --scheduler needs it: pip install 'refluence[distributed]'"


def _accelerators() -> list[str]:
    found = [
        f"cuda:{index} ({torch.cuda.get_device_name(index)}, "
        f"{torch.cuda.get_device_properties(index).total_memory / 1e9:.0f} GB)"
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def _caches() -> list[tuple[str, str]]:
    files = list(checkpoint_folder().glob("*.safetensors")) if checkpoint_folder().is_dir() else []
    return [
        ("cache", f"{cache_folder()} ({_origin(CACHE_VARIABLE)}; {_writable(cache_folder())})"),
        ("checkpoints", f"{len(files):,} in the cache, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB"),
    ]


def _origin(variable: str) -> str:
    return f"from ${variable}" if os.environ.get(variable) else f"${variable} is not set"


def _writable(folder: Path) -> str:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return "writable" if os.access(existing, os.W_OK) else "not writable"


def _data() -> list[tuple[str, str]]:
    chosen = os.environ.get(DATA_VARIABLE)
    lines = [(f"${DATA_VARIABLE}", chosen or "not set")]
    for name in dataset_names():
        found = availability(name)
        size = "" if found.available else f" ({found.download / 1e6:.1f} MB)"
        lines.append((name, found.detail + size if found.folder is None else f"{found.folder}: {found.detail}"))
    return lines
