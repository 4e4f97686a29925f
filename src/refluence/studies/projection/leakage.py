"""What a sketch invents for the part of a test gradient outside range(F), measured and predicted (Theorems 8, 9)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.errors import DataError
from refluence.studies.projection.factor_leakage import FactorGrid, factor_leakage
from refluence.studies.projection.gaussian import GramGaussian
from refluence.studies.projection.grid import Dampings, Sizes, Sketching, SketchSource
from refluence.studies.projection.leakage_outcome import factor_figure, leakage_figure, page_of, summary_of
from refluence.studies.projection.problem import Problem
from refluence.studies.projection.projected import Projected
from refluence.studies.projection.spectral import Spectral
from refluence.studies.projection.spectrum_bounds import kept_dampings
from refluence.studies.projection.study import GridOptions, Study, make_source
from refluence.studies.projection.system import SketchedSystem

OUTSIDE = 1e-6
"""A test counts as out of range where ‖v_⊥‖ exceeds this share of ‖v‖."""
NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Leakage(GridOptions):
    """One run of the study, see `GridOptions`.

    Args:
        min_d_lambda: dampings of a smaller effective dimension are left out.
        factors: of the factorised part.
    """

    NAME = "leakage"

    sizes: Sizes = field(default_factory=lambda: Sizes(m_exp_min=5, m_exp_max=12))
    dampings: Dampings = field(default_factory=lambda: Dampings(-4, 0))
    min_d_lambda: float = 1.0
    factors: FactorGrid = field(default_factory=FactorGrid)


@dataclass(frozen=True, eq=False)
class KernelParts:
    """Sketches of v_⊥ in the place of v: their scores are leakage, and nothing else."""

    source: SketchSource
    spectral: Spectral

    def systems(self, seed: int, sizes: Sequence[int], wanted: set[int]) -> Iterator[SketchedSystem]:
        """The systems of the wanted sizes, ascending."""
        n, values = self.spectral.n, self.spectral.eigenvalues[: self.spectral.rank]
        # v_∥ = Gᵀα
        inside = self.spectral.basis @ (self.spectral.tests / (n * values).sqrt()).T
        for system in self.source.systems(seed, sizes, wanted):
            known = n * system.curvature @ inside if system.left is None else system.left.T @ inside
            yield replace(system, right=system.right - known)


def kernel_source(problem: Problem, spectral: Spectral, sketching: Sketching, cache_dir: Path | None) -> SketchSource:
    """Sketches of v_⊥; in the eigenvectors of F they need no subtraction."""
    if sketching.proj_type == "normal" and sketching.gram_space:
        return GramGaussian(replace(spectral, tests=torch.zeros_like(spectral.tests)))
    source = make_source(problem, spectral, sketching, cache_dir)
    assert isinstance(source, Projected)
    return KernelParts(source, spectral)


@dataclass(frozen=True, eq=False)
class LeakageMeter:
    """Leakage of every test into the scores with every train example, and its predicted size.

    Given the sketch on range(F), L_ij ~ N(0, ‖v_⊥j‖²‖z_i‖²/m) with z_i = (PFPᵀ+λ)⁻¹Pg_i for Gaussian P.

    Args:
        norms: ‖v_⊥‖ of the tests.
        dampings: λ.
    """

    norms: Float64[Tensor, " k"]
    dampings: tuple[float, ...]

    def measure(self, system: SketchedSystem) -> dict[str, Tensor]:
        """Mean squares over train examples, "measured" and "predicted" (dampings, tests), and the share "covered".

        A pair is covered where its leakage is within 1.96 predicted deviations.
        """
        values, vectors = torch.linalg.eigh(system.curvature)
        values.clamp_(min=0.0)
        left = vectors if system.left is None else system.left @ vectors
        right = vectors.T @ system.right
        scale = len(left) if system.left is None else 1
        measured, predicted, covered = [], [], []
        for damping in self.dampings:
            weights = (values if system.dual else torch.ones_like(values)) / (values + damping).square()
            solved = scale * left.square() @ weights
            scores = left @ (right / (values + damping)[:, None])
            deviations = (solved / system.size).sqrt()[:, None] * self.norms
            measured.append(scores.square().mean(dim=0))
            predicted.append(self.norms.square() * solved.mean() / system.size)
            covered.append((scores.abs() <= NORMAL_95 * deviations).double().mean())
        return {
            "measured": torch.stack(measured),
            "predicted": torch.stack(predicted),
            "covered": torch.stack(covered),
        }


def run(options: Leakage, out: Path, *, cache_dir: Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Do the study in a folder, or what is left of it, and return the content of its `summary.json`.

    Raises:
        DataError: data that is not on this machine; a folder of something else or of other settings; no test gradient
            outside the range.
    """
    study = Study.open(options, out, cache_dir, progress)
    spectral = study.spectral
    whole, beyond = spectral.test_norms(), spectral.kernel_norms()
    outside = (beyond > OUTSIDE * whole).nonzero()[:, 0]
    if len(outside) == 0:
        raise DataError("no test gradient has a part outside the range of the train gradients: take fewer train rows")
    norms = beyond[outside]
    dampings = tuple(kept_dampings(spectral, options.dampings.values(), options.min_d_lambda))
    meter = LeakageMeter(norms, dampings)
    exact = [float(spectral.scores(damping)[:, outside].square().mean().sqrt()) for damping in dampings]

    def source() -> SketchSource:
        return _OfTests(kernel_source(study.problem, spectral, options.sketching, cache_dir), outside)

    sizes = options.sizes.below(study.problem.parameters)
    rows, tests = [], []
    for trial, m, stage in study.measure(options.sketching, sizes, meter.measure, source):
        found = stage.tensors
        for place, damping in enumerate(dampings):
            measured, predicted = found["measured"][place], found["predicted"][place]
            rows.append(
                {
                    "trial": trial,
                    "m": m,
                    "damping": damping,
                    "effective_dimension": spectral.dimension(damping),
                    "measured": float(measured.mean().sqrt()),
                    "predicted": float(predicted.mean().sqrt()),
                    "ratio": float((measured / predicted).mean().sqrt()),
                    "covered": float(found["covered"][place]),
                    "over_scores": float(measured.mean().sqrt()) / exact[place],
                }
            )
            tests.append(
                pd.DataFrame(
                    {
                        "trial": trial,
                        "m": m,
                        "damping": damping,
                        "test": outside.cpu().numpy(),
                        "outside_norm": norms.cpu().numpy(),
                        "measured": measured.sqrt().numpy(),
                        "predicted": predicted.sqrt().numpy(),
                    }
                )
            )
    results, per_test = pd.DataFrame(rows), pd.concat(tests, ignore_index=True)
    parts = factor_leakage(study.folder, study.problem, options.factors, options.sketching.seed)
    facts = study.facts(
        tests_outside=len(outside),
        median_share_outside=float((beyond / whole.clamp(min=1e-300)).median()),
    )
    summary = summary_of(facts, results, per_test, parts)
    study.folder.write_frame("tests.parquet", per_test)
    figures = {"leakage": leakage_figure(results, per_test)}
    if parts is not None:
        study.folder.write_frame("factorised.parquet", parts)
        figures["factorised"] = factor_figure(parts)
    return study.finish(summary, results, figures, page_of(summary, results, figures))


@dataclass(frozen=True, eq=False)
class _OfTests:
    """The systems of some of the tests."""

    source: SketchSource
    tests: Tensor

    def systems(self, seed: int, sizes: Sequence[int], wanted: set[int]) -> Iterator[SketchedSystem]:
        for system in self.source.systems(seed, sizes, wanted):
            yield replace(system, right=system.right[:, self.tests])
