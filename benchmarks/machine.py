"""What the report says of the machine and the versions; no names and no paths."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("refluence", "torch", "numpy", "scipy", "scikit-learn", "kronfluence", "pydvl", "dattri")


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        if line.startswith(name):
            return line.split(":", 1)[1].strip()
    return "unknown"


def describe() -> dict[str, str]:
    """Processor, cores, memory, system and time."""
    flags = _field("/proc/cpuinfo", "flags").split()
    units = [label for flag, label in (("avx2", "AVX2"), ("avx512f", "AVX-512"), ("amx_tile", "AMX")) if flag in flags]
    memory = int(_field("/proc/meminfo", "MemTotal").split()[0]) * 1024 / 2**30
    return {
        "processor": f"{_field('/proc/cpuinfo', 'model name')} ({', '.join(units) or 'no vector units known'})",
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} on {platform.machine()}",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def versions() -> dict[str, str]:
    """Installed versions; "not installed" where a peer is missing."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
