"""Approximation error against sketch size over effective dimension: the paper's Figures 1 and 2."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from refluence.errors import DataError
from refluence.studies.folder import StudyFolder
from refluence.studies.projection.errors import ErrorMeter
from refluence.studies.projection.gaussian import GramGaussian
from refluence.studies.projection.grid import Dampings, Sizes, Sketching, SketchSource, measure_grid
from refluence.studies.projection.output import finish
from refluence.studies.projection.problem import Problem, ProblemOptions
from refluence.studies.projection.projected import Projected
from refluence.studies.projection.spectral import Spectral
from refluence.studies.projection.spectrum_outcome import error_figure, page_of, spectrum_figure, summary_of

NAME = "spectrum-bounds"
TEST_MODES = ("self", "test")
FORMAT = 1


@dataclass(frozen=True)
class SpectrumBounds:
    """One run of the study.

    Args:
        problem: data set and model.
        sketching: projection and trials.
        sizes: m.
        dampings: λ.
        test_mode: "self": self-influence of the first train examples; "test": every pair of a train and a test example.
        min_d_lambda: dampings of a smaller effective dimension are left out.
        corrected: also the scores at μ = λ(1 − d_λ/m), which estimate those at λ.

    Raises:
        DataError: an unknown test mode.
    """

    problem: ProblemOptions = field(default_factory=ProblemOptions)
    sketching: Sketching = field(default_factory=Sketching)
    sizes: Sizes = field(default_factory=Sizes)
    dampings: Dampings = field(default_factory=Dampings)
    test_mode: str = "self"
    min_d_lambda: float = 1.0
    corrected: bool = True

    def __post_init__(self) -> None:
        if self.test_mode not in TEST_MODES:
            raise DataError(f"test_mode must be one of {', '.join(TEST_MODES)}, not {self.test_mode!r}")

    def record(self) -> dict[str, Any]:
        """All that the numbers depend on, JSON-able."""
        sketching = asdict(self.sketching)
        del sketching["offload"]
        return {
            "format": FORMAT,
            **self.problem.record(),
            **sketching,
            **asdict(self.sizes),
            **asdict(self.dampings),
            "test_mode": self.test_mode,
            "min_d_lambda": self.min_d_lambda,
            "corrected": self.corrected,
        }


def run(options: SpectrumBounds, out: Path, *, cache_dir: Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Do the study in a folder, or what is left of it, and return the content of its `summary.json`.

    Raises:
        DataError: data that is not on this machine; a folder of something else or of other settings; no damping left.
    """
    begin = time.process_time()
    folder = StudyFolder(Path(out), NAME, options.record())
    folder.begin()
    problem = Problem(options.problem, progress)
    spectral = problem.spectral(folder, cache_dir)
    if options.test_mode == "self":
        spectral = spectral.of_train(min(options.problem.num_test_grads, spectral.n))
    dampings = kept_dampings(spectral, options.dampings.values(), options.min_d_lambda)
    meter = ErrorMeter(spectral, tuple(dampings), options.test_mode == "self", options.corrected)
    sizes = options.sizes.below(problem.parameters)
    of_train = len(spectral.tests) if options.test_mode == "self" else None

    def source() -> SketchSource:
        return make_source(problem, spectral, options.sketching, cache_dir, of_train)

    frames = [
        meter.frame(stage.tensors).assign(trial=trial, m=m)
        for trial, m, stage in measure_grid(folder, source, options.sketching, sizes, meter.measure, progress)
    ]
    results = pd.concat(frames, ignore_index=True)
    results["m_over_d"] = results["m"] / results["effective_dimension"]
    plateau = meter.frame({"plain": meter.without_sketch()}).set_index("damping")
    facts = problem.facts() | {
        "rank": spectral.cut,
        "resolved_rank": spectral.rank,
        "largest_eigenvalue": float(spectral.eigenvalues[0]),
        "pairs": len(spectral.tests) * (1 if options.test_mode == "self" else spectral.n),
    }
    summary = summary_of(options.record(), facts, results, plateau, "relative" if of_train is not None else "eps")
    summary["cpu_seconds"] = time.process_time() - begin
    figures = {
        "errors": error_figure(results, plateau, summary),
        "spectrum": spectrum_figure(spectral.eigenvalues.cpu().numpy(), spectral.cut, summary),
    }
    finish(folder, summary, results, figures, page_of(summary, figures))
    return summary


def kept_dampings(spectral: Spectral, dampings: Sequence[float], least: float) -> list[float]:
    """Those whose effective dimension is at least so large.

    Raises:
        DataError: none is.
    """
    if not (kept := [damping for damping in dampings if spectral.dimension(damping) >= least]):
        raise DataError(
            f"no damping has an effective dimension of {least:g} or more, not even {min(dampings):.3g}, which has "
            f"{spectral.dimension(min(dampings)):.3g}: lower min_d_lambda or lambda_exp_min"
        )
    return kept


def make_source(
    problem: Problem, spectral: Spectral, sketching: Sketching, cache_dir: Path | None, of_train: int | None = None
) -> SketchSource:
    """Gaussian sketches in the eigenvectors of F, or sketches of the gradients themselves."""
    if sketching.proj_type == "normal" and sketching.gram_space:
        return GramGaussian(spectral)
    return Projected(
        sketching.proj_type, problem.rows("train"), problem.rows("test"), sketching.offload, cache_dir, of_train
    )
