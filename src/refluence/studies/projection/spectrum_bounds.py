"""Approximation error against sketch size over effective dimension: the paper's Figures 1 and 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from refluence.errors import DataError
from refluence.studies.projection.errors import ErrorMeter
from refluence.studies.projection.grid import SketchSource
from refluence.studies.projection.spectral import Spectral
from refluence.studies.projection.spectrum_outcome import error_figure, page_of, spectrum_figure, summary_of
from refluence.studies.projection.study import GridOptions, Study, make_source

NAME = "spectrum-bounds"
TEST_MODES = ("self", "test")
FORMAT = 1


@dataclass(frozen=True)
class SpectrumBounds(GridOptions):
    """One run of the study, see `GridOptions`.

    Args:
        test_mode: "self": self-influence of the first train examples; "test": every pair of a train and a test example.
        min_d_lambda: dampings of a smaller effective dimension are left out.
        corrected: also the scores at μ = λ(1 − d_λ/m), which estimate those at λ.

    Raises:
        DataError: an unknown test mode.
    """

    NAME = "spectrum-bounds"

    test_mode: str = "self"
    min_d_lambda: float = 1.0
    corrected: bool = True

    def __post_init__(self) -> None:
        if self.test_mode not in TEST_MODES:
            raise DataError(f"test_mode must be one of {', '.join(TEST_MODES)}, not {self.test_mode!r}")


def run(options: SpectrumBounds, out: Path, *, cache_dir: Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Do the study in a folder, or what is left of it, and return the content of its `summary.json`.

    Raises:
        DataError: data that is not on this machine; a folder of something else or of other settings; no damping left.
    """
    study = Study.open(options, out, cache_dir, progress)
    spectral = study.spectral
    if options.test_mode == "self":
        spectral = spectral.of_train(min(options.problem.num_test_grads, spectral.n))
    dampings = kept_dampings(spectral, options.dampings.values(), options.min_d_lambda)
    meter = ErrorMeter(spectral, tuple(dampings), options.test_mode == "self", options.corrected)
    sizes = options.sizes.below(study.problem.parameters)
    of_train = len(spectral.tests) if options.test_mode == "self" else None

    def source() -> SketchSource:
        return make_source(study.problem, spectral, options.sketching, cache_dir, of_train)

    frames = [
        meter.frame(stage.tensors).assign(trial=trial, m=m)
        for trial, m, stage in study.measure(options.sketching, sizes, meter.measure, source)
    ]
    results = pd.concat(frames, ignore_index=True)
    results["m_over_d"] = results["m"] / results["effective_dimension"]
    plateau = meter.frame({"plain": meter.without_sketch()}).set_index("damping")
    facts = study.facts(
        rank=spectral.cut,
        resolved_rank=spectral.rank,
        largest_eigenvalue=float(spectral.eigenvalues[0]),
        pairs=len(spectral.tests) * (1 if options.test_mode == "self" else spectral.n),
    )
    summary = summary_of(facts, results, plateau, "relative" if of_train is not None else "eps")
    figures = {
        "errors": error_figure(results, plateau, summary),
        "spectrum": spectrum_figure(spectral.eigenvalues.cpu().numpy(), spectral.cut, summary),
    }
    return study.finish(summary, results, figures, page_of(summary, figures))


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
