"""The folder of a study: finished stages are kept, so that the same study on it goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from refluence._version import __version__
from refluence.errors import DataError
from refluence.files import replacing, write_text
from refluence.training.files import read_tensors, write_tensors

MANIFEST, SUMMARY, RESULTS, REPORT, STAGES = (
    "manifest.json",
    "summary.json",
    "results.parquet",
    "report.html",
    "stages",
)
_TOOL = "refluence study"
_FACTS = "facts"


@dataclass(frozen=True, eq=False)
class Stage:
    """What a stage of a study found: tensors, and JSON-able facts."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class StudyFolder:
    """`summary.json`, `results.parquet`, figures, `report.html`, `manifest.json`, and the finished stages.

    Args:
        path: the folder.
        study: the name of the study.
        settings: all that its numbers depend on, JSON-able.
    """

    path: Path
    study: str
    settings: Mapping[str, Any]

    def begin(self) -> None:
        """Make the folder, or take up an earlier run of the same study with the same settings.

        Raises:
            DataError: a file, a folder of something else, or of other settings.
        """
        if self.path.is_file():
            raise DataError(f"{self.path} is a file: give a folder with --out")
        found = self._manifest()
        if found is None and self.path.is_dir() and any(self.path.iterdir()):
            raise DataError(f"{self.path} is not empty and holds no study: give another folder with --out")
        if found is not None:
            self._refuse_others(found)
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_manifest("running")

    def stage(self, name: str, work: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> Stage:
        """What the stage found before, else what `work` finds now, kept at once; its seconds are a fact."""
        path = self.path / STAGES / f"{name}.safetensors"
        if (read := read_tensors(path)) is not None:
            return Stage(read[0], json.loads(read[1][_FACTS]))
        begin = time.perf_counter()
        tensors, facts = work()
        facts = {**facts, "seconds": round(time.perf_counter() - begin, 3)}
        write_tensors(path, tensors, {_FACTS: json.dumps(facts)})
        return Stage(tensors, facts)

    def is_done(self, name: str) -> bool:
        """Whether a stage is kept."""
        return read_tensors(self.path / STAGES / f"{name}.safetensors") is not None

    def part(self, name: str) -> Path:
        """A folder for the parts of a stage that keeps its own."""
        return self.path / STAGES / name

    def write_text(self, name: str, text: str) -> Path:
        """Write a file in one step."""
        path = self.path / name
        write_text(path, text)
        return path

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write a mapping as indented JSON; NaN is null, which every reader of JSON knows."""
        return self.write_text(name, json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n")

    def write_frame(self, name: str, frame: pd.DataFrame) -> Path:
        """Write a table as parquet, in one step."""
        with replacing(self.path / name) as temporary:
            frame.to_parquet(temporary, index=False)
        return self.path / name

    def write_manifest(self, status: str, **more: Any) -> None:
        """Say which study this folder is, with what settings, and how far it is."""
        self.write_json(
            MANIFEST,
            {
                "tool": _TOOL,
                "study": self.study,
                "status": status,
                "version": __version__,
                "written": datetime.now(UTC).isoformat(timespec="seconds"),
                "settings": dict(self.settings),
                **more,
            },
        )

    def _manifest(self) -> dict[str, Any] | None:
        try:
            content = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) and content.get("tool") == _TOOL else None

    def _refuse_others(self, found: Mapping[str, Any]) -> None:
        if found.get("study") != self.study:
            raise DataError(
                f"{self.path} holds the study {found.get('study')!r}, not {self.study!r}: give another --out"
            )
        before, now = found.get("settings") or {}, json.loads(json.dumps(dict(self.settings)))
        for name in [*now, *(set(before) - set(now))]:
            if before.get(name) != now.get(name):
                raise DataError(
                    f"{self.path} holds this study with {name} {before.get(name)!r}, not {now.get(name)!r}: give "
                    "another --out, or delete the folder"
                )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
