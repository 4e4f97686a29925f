"""What all studies begin and end with: settings, folder, problem, sketches on a grid, and the files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from matplotlib.figure import Figure

from refluence.studies.folder import Stage, StudyFolder
from refluence.studies.page import StudyPage
from refluence.studies.projection import output
from refluence.studies.projection.gaussian import GramGaussian
from refluence.studies.projection.grid import Dampings, Measure, Sizes, Sketching, SketchSource, measure_grid
from refluence.studies.projection.problem import Problem, ProblemOptions
from refluence.studies.projection.projected import Projected
from refluence.studies.projection.record import Recorded
from refluence.studies.projection.spectral import Spectral


@dataclass(frozen=True)
class StudyOptions(Recorded):
    """The settings of one run of a study.

    `NAME` is the study's, `FORMAT` grows when the same settings give other numbers or files.

    Args:
        problem: data set and model.
    """

    NAME: ClassVar[str]
    FORMAT: ClassVar[int] = 1

    problem: ProblemOptions = field(default_factory=ProblemOptions)

    def record(self) -> dict[str, Any]:
        """All that the numbers depend on, JSON-able."""
        return {"format": self.FORMAT} | super().record()


@dataclass(frozen=True)
class GridOptions(StudyOptions):
    """The settings of a study over sketches, sizes and dampings.

    Args:
        problem: data set and model.
        sketching: projection and trials.
        sizes: m.
        dampings: λ.
    """

    sketching: Sketching = field(default_factory=Sketching)
    sizes: Sizes = field(default_factory=Sizes)
    dampings: Dampings = field(default_factory=Dampings)


@dataclass(frozen=True, eq=False)
class Study:
    """A study that runs in a folder.

    Args:
        folder: its folder, begun.
        problem: what it studies.
        cache_dir: a folder for spectra that studies share, and for projected rows on disk.
        progress: show how far it is.
        began: the CPU seconds of this process at its opening.
    """

    folder: StudyFolder
    problem: Problem
    cache_dir: Path | None
    progress: bool
    began: float

    @classmethod
    def open(cls, options: StudyOptions, out: Path, cache_dir: Path | None, progress: bool) -> Study:
        """Begin in a new folder, or take up the same study in an old one.

        Raises:
            DataError: a folder of something else or of other settings.
        """
        began = time.process_time()
        folder = StudyFolder(Path(out), options.NAME, options.record())
        folder.begin()
        return cls(folder, Problem(options.problem, progress), cache_dir, progress, began)

    @cached_property
    def spectral(self) -> Spectral:
        """The spectrum of the problem, computed once."""
        return self.problem.spectral(self.folder, self.cache_dir)

    def measure(
        self,
        sketching: Sketching,
        sizes: Sequence[int],
        measure: Measure,
        source: Callable[[], SketchSource] | None = None,
        part: str = "grid",
        only: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, int, Stage]]:
        """(trial, m, what `measure` found) for every trial and size, see `measure_grid`.

        The sketches are those of the train and test gradients, unless another source is given.
        """

        def own() -> SketchSource:
            return make_source(self.problem, self.spectral, sketching, self.cache_dir)

        return measure_grid(self.folder, source or own, sketching, sizes, measure, self.progress, part, only)

    def facts(self, **more: Any) -> dict[str, Any]:
        """What every summary begins with: name, settings, problem, and more."""
        return {"study": self.folder.study, **self.folder.settings, **self.problem.facts(), **more}

    def finish(
        self, summary: Mapping[str, Any], results: pd.DataFrame, figures: Mapping[str, Figure], page: StudyPage
    ) -> dict[str, Any]:
        """Write all files, and return the content of `summary.json`, which ends with the CPU seconds."""
        whole = {**summary, "cpu_seconds": time.process_time() - self.began}
        output.finish(self.folder, whole, results, figures, page)
        return whole


def make_source(
    problem: Problem, spectral: Spectral, sketching: Sketching, cache_dir: Path | None, of_train: int | None = None
) -> SketchSource:
    """Gaussian sketches in the eigenvectors of F, or sketches of the gradients themselves."""
    if sketching.proj_type == "normal" and sketching.gram_space:
        return GramGaussian(spectral)
    return Projected(
        sketching.proj_type, problem.rows("train"), problem.rows("test"), sketching.offload, cache_dir, of_train
    )
