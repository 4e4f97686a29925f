"""The folder of the results: never somebody else's, and recognisable after a run that was cut off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from refluence._version import __version__
from refluence.errors import DataError
from refluence.files import write_text

MANIFEST, SCORES, TOP, REPORT = "manifest.json", "scores.zarr", "top.parquet", "report.html"
CERTIFICATE, LEVERAGE = "certificate.parquet", "leverage.parquet"
SUMMARY, RESULTS, GROUND_TRUTH, FIGURES = "summary.json", "results.parquet", "ground-truth", "figures"
_TOOL = "refluence"


@dataclass(frozen=True)
class OutputFolder:
    """`manifest.json`, which marks the folder as ours, `report.html`, and the results of the command: `scores.zarr` and
    `top.parquet`, or `summary.json`, `results.parquet`, `figures` and `ground-truth`, which alone outlives a new run.
    """

    path: Path

    @property
    def manifest(self) -> Path:
        """All that determined the results."""
        return self.path / MANIFEST

    @property
    def scores(self) -> Path:
        """What `Scores.load` reads."""
        return self.path / SCORES

    @property
    def top(self) -> Path:
        """The most helpful and most harmful train rows of each test row."""
        return self.path / TOP

    @property
    def certificate(self) -> Path:
        """What is known of the error of each test's scores."""
        return self.path / CERTIFICATE

    @property
    def leverage(self) -> Path:
        """What `LeverageScores.load` reads."""
        return self.path / LEVERAGE

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / REPORT

    @property
    def summary(self) -> Path:
        """The results of an evaluation as flat keys."""
        return self.path / SUMMARY

    @property
    def results(self) -> Path:
        """The results of an evaluation as a tidy table."""
        return self.path / RESULTS

    @property
    def figures(self) -> Path:
        """The pictures of an evaluation."""
        return self.path / FIGURES

    @property
    def ground_truth(self) -> Path:
        """What retrained models measured; kept, so that nothing is retrained twice."""
        return self.path / GROUND_TRUTH

    def check(self) -> None:
        """Raise a DataError if something else made this folder; nothing is written."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise DataError(f"{self.path} is a file: give a folder with --out")
        if any(self.path.iterdir()) and not self._ours():
            raise DataError(f"{self.path} is not empty and was not made by refluence: give another folder with --out")

    def begin(self, command: str) -> None:
        """Mark the folder as ours and remove the results of an earlier run, but not its ground truth.

        Raises:
            DataError: something else made this folder.
        """
        self.check()
        self.path.mkdir(parents=True, exist_ok=True)
        self._write({"status": "running", "command": command})
        for old in (self.top, self.certificate, self.leverage, self.report, self.summary, self.results):
            old.unlink(missing_ok=True)
        for old in (self.scores, self.figures):
            if old.is_dir():
                shutil.rmtree(old)

    @contextmanager
    def marked(self) -> Iterator[None]:
        """While open, an error leaves the folder marked as failed, with the error."""
        try:
            yield
        except BaseException as error:
            self._write({"status": "failed", "error": f"{type(error).__name__}: {error}"})
            raise

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest of a complete run."""
        tables = (self.scores, self.top, self.certificate, self.leverage, self.summary, self.results)
        results = (*tables, self.figures, self.ground_truth, self.report)
        files = [path.name for path in results if path.exists()]
        self._write({"status": "complete", **manifest, "files": files})

    def _ours(self) -> bool:
        try:
            content = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(content, dict) and content.get("tool") == _TOOL

    def _write(self, content: dict[str, Any]) -> None:
        written = datetime.now(UTC).isoformat(timespec="seconds")
        content = {"tool": _TOOL, "version": __version__, "written": written, **content}
        write_text(self.manifest, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
