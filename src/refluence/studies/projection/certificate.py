"""Do certificates hold? Intervals, certain bounds and order statistics of many sketches, against exact scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float64
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from refluence.certificates.sampled import SampledCheck, needed_sample
from refluence.errors import DataError
from refluence.studies.page import Fact, Picture, StudyPage
from refluence.studies.projection.grid import Sketching
from refluence.studies.projection.output import GUIDE, new_figure, projection_page, short, table_of
from refluence.studies.projection.problem import ProblemOptions
from refluence.studies.projection.sketched_scores import SketchedScores
from refluence.studies.projection.spectral import Spectral
from refluence.studies.projection.study import Study, StudyOptions
from refluence.studies.projection.system import SketchedSystem
from refluence.theory import corrected_damping, damping_for, sketch_variance_scale
from refluence.theory.certified import certain_bounds

CONFIDENCE = 0.95
SHARE = 0.9
"""Of the tests that the order statistic is to bound."""
ORDERS = 40
"""Random samples of tests for each sketch."""
ROUNDING = 1e-9
COLUMNS = ("covered", "spread", "error", "factor", "bound", "violations", "held", "share")


@dataclass(frozen=True)
class CertificateStudy(StudyOptions):
    """One run of the study.

    Args:
        problem: data set and model.
        sketching: projection and how many sketches.
        dimension: d_κ of the damping κ that the scores estimate.
        ratios: sketch sizes over d_κ.

    Raises:
        DataError: a dimension or ratio that is not above 0 and 1.
    """

    NAME = "certificate"

    problem: ProblemOptions = field(default_factory=lambda: ProblemOptions(n_train=600, num_test_grads=200))
    sketching: Sketching = field(default_factory=lambda: Sketching(num_trials=200))
    dimension: float = 60.0
    ratios: Sequence[float] = (1.5, 2.0, 4.0, 8.0)

    def __post_init__(self) -> None:
        if not self.dimension > 0:
            raise DataError(f"dimension must be > 0, not {self.dimension!r}")
        if not self.ratios or not all(ratio > 1 for ratio in self.ratios):
            raise DataError(f"ratios must all be above 1, not {list(self.ratios)!r}: a sketch of d_κ rows has no κ")

    def sizes(self, rank: int) -> list[int]:
        """Ascending.

        Raises:
            DataError: a size of the rank or more, where the study has no sketched rows.
        """
        sizes = sorted({round(ratio * self.dimension) for ratio in self.ratios})
        if sizes[-1] >= rank:
            raise DataError(
                f"the largest sketch has {sizes[-1]} rows, but the train gradients have rank {rank}: use fewer ratios, "
                "a smaller dimension or more train rows"
            )
        return sizes


@dataclass(frozen=True, eq=False)
class CertificateMeter:
    """What one sketch's certificates say, and whether it is so.

    "covered": share of pairs whose 95 % interval holds the exact score; "spread": root mean square of error over
    standard error; "error": ‖τ̃ − τ‖/‖τ‖ over all pairs; "factor", "bound": of the certain bound, and the median over
    tests of ‖bound_i‖/‖τ_i‖; "violations": pairs outside it; "held": share of random samples of tests whose order
    statistic bounds as many of the others as it says, NaN with too few tests; "share": the mean share that it bounds.
    """

    spectral: Spectral
    target: float

    @cached_property
    def exact(self) -> Float64[Tensor, "k n"]:
        """τ at κ."""
        return self.spectral.scores(self.target).T

    @cached_property
    def _given(self) -> tuple[Tensor, Tensor, Tensor]:
        """(K, G Vᵀ, ‖v‖²)."""
        basis, roots, tests = self.spectral.basis, self.spectral.roots, self.spectral.tests
        gram = (basis * roots.square()) @ basis.T
        norms = tests.square().sum(dim=1) + self.spectral.outside.square().sum(dim=1)
        return gram, self.spectral.n**0.5 * (basis * roots) @ tests.T, norms

    def measure(self, system: SketchedSystem) -> dict[str, Tensor]:
        """The numbers of one sketch."""
        assert system.left is not None
        rows, tests = system.left, system.right.T
        sketched = SketchedScores.of(system)
        mu = corrected_damping(sketched.values, system.size, self.target)
        scores, errors = sketched.at(mu, sketch_variance_scale(sketched.values, system.size, mu))
        away = (scores - self.exact).abs()
        gram, across, norms = self._given
        certain = certain_bounds(gram, rows, across, tests, norms, self.target, mu)
        relative = away.norm(dim=1) / self.exact.norm(dim=1)
        held, share = self._orders(relative)
        half = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * errors
        found = {
            "covered": (away <= half).double().mean(),
            "spread": (away / errors).square().mean().sqrt(),
            "error": away.norm() / self.exact.norm(),
            "factor": certain.factor,
            "bound": (certain.values.norm(dim=1) / self.exact.norm(dim=1)).median(),
            "violations": (away > certain.values * (1 + ROUNDING)).sum(),
            "held": held,
            "share": share,
        }
        return {"found": torch.tensor([float(found[name]) for name in COLUMNS], dtype=torch.float64)}

    def _orders(self, errors: Float64[Tensor, " k"]) -> tuple[float, float]:
        """(share of samples whose bound holds for SHARE of the other tests, mean share bounded)."""
        least = needed_sample(SHARE, CONFIDENCE)
        size = min(2 * least, len(errors) // 2)
        if size < least:
            return float("nan"), float("nan")
        generator = torch.Generator().manual_seed(0)
        shares = []
        for _ in range(ORDERS):
            order = torch.randperm(len(errors), generator=generator)
            drawn, others = errors[order[:size]], errors[order[size:]]
            check = SampledCheck(order[:size], drawn[:, None], drawn, "exact", None, None, CONFIDENCE)
            shares.append(float((others <= check.bound(SHARE)).double().mean()))
        return sum(share >= SHARE for share in shares) / ORDERS, sum(shares) / ORDERS


def run(
    options: CertificateStudy, out: Path, *, cache_dir: Path | None = None, progress: bool = True
) -> dict[str, Any]:
    """Do the study in a folder, or what is left of it, and return the content of its `summary.json`.

    Raises:
        DataError: data that is not on this machine; a folder of something else or of other settings.
    """
    study = Study.open(options, out, cache_dir, progress)
    spectral = study.spectral
    target = damping_for(spectral.eigenvalues, options.dimension)
    meter = CertificateMeter(spectral, target)

    sizes = options.sizes(spectral.rank)
    rows = [
        {"trial": trial, "m": m, **dict(zip(COLUMNS, stage.tensors["found"].tolist(), strict=True))}
        for trial, m, stage in study.measure(options.sketching, sizes, meter.measure)
    ]
    results = pd.DataFrame(rows)
    outside = spectral.kernel_norms() / spectral.test_norms()
    facts = study.facts(damping=target, rank=spectral.rank, outside=float(outside.median()))
    summary = summary_of(facts, results)
    figures = {"coverage": coverage_figure(results, options.dimension)}
    return study.finish(summary, results, figures, page_of(summary, figures["coverage"]))


def summary_of(facts: dict[str, Any], results: pd.DataFrame) -> dict[str, Any]:
    """The content of `summary.json`: flat keys, lists in the order of `m`, means over sketches."""
    groups = results.groupby("m")
    means = groups.mean()
    return {
        **facts,
        "m": [int(m) for m in means.index],
        "m_over_d": [m / facts["dimension"] for m in means.index],
        **{name: means[name].tolist() for name in COLUMNS if name != "violations"},
        "covered_low": groups["covered"].quantile(0.05).tolist(),
        "covered_high": groups["covered"].quantile(0.95).tolist(),
        "violations": int(results["violations"].sum()),
        "pairs": facts["n"] * facts["tests"] * len(results),
    }


def coverage_figure(results: pd.DataFrame, dimension: float) -> Figure:
    """Coverage of intervals, and the certain bound beside the error, against m/d_κ."""
    figure, axes = new_figure(2)
    left, right = axes[0]
    groups = results.groupby("m")
    means, x = groups.mean(), groups.mean().index.to_numpy() / dimension
    low, high = groups["covered"].quantile(0.05), groups["covered"].quantile(0.95)
    left.plot(x, means["covered"], color="#0a5c9e", marker="o", markersize=4, label="95 % intervals")
    left.fill_between(x, low, high, color="#0a5c9e", alpha=0.18, linewidth=0)
    left.plot(x, means["held"], color="#c8640f", marker="s", markersize=4, label="order statistics, said 95 %")
    left.axhline(CONFIDENCE, color=GUIDE, linewidth=0.9, linestyle="--")
    left.set(xscale="log", xlabel="m ÷ d_κ", ylabel="share that holds", ylim=(0.85, 1.005))
    for name, label, color in (("bound", "certain bound, median test", "#c8640f"), ("error", "error", "#0a5c9e")):
        right.plot(x, means[name], color=color, marker="o", markersize=4, label=label)
    right.plot(x, means["factor"], color=GUIDE, marker="^", markersize=4, label="its factor")
    right.set(xscale="log", yscale="log", xlabel="m ÷ d_κ", ylabel="in units of the scores")
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=8)
    return figure


def page_of(summary: dict[str, Any], figure: Figure) -> StudyPage:
    """The page."""
    columns = {
        "95 % intervals hold": "covered",
        "error ÷ standard error": "spread",
        "error ÷ scores": "error",
        "factor": "factor",
        "certain bound ÷ scores": "bound",
        "order statistic holds": "held",
        "bounds": "share",
    }
    table = table_of(summary, columns, "m", 4)
    return projection_page(
        title="Do certificates hold?",
        lead=f"{summary['model']} on {summary['dataset']}: {summary['num_trials']} {summary['proj_type']} sketches of "
        f"{summary['n']:,} train gradients, {summary['tests']} tests, damping with d_κ = {summary['dimension']:g}.",
        facts=(
            Fact("Pairs", f"{summary['pairs']:,}", "of a train row, a test row and a sketch"),
            Fact("Outside a certain bound", f"{summary['violations']:,}", "must be none"),
            Fact("Intervals", " to ".join(short(f(summary["covered"]), 4) for f in (min, max)), "hold; said: 0.95"),
            Fact("Out of range", short(summary["outside"]), "of a test gradient's norm, in the median"),
        ),
        pictures=(
            Picture(
                figure,
                "Coverage of intervals and of order statistics, and the certain bound beside the error, against m/d_κ",
                "Left: means over sketches; the band is 5 to 95 % of single sketches. Right: relative to the scores.",
            ),
        ),
        findings=(
            (
                "Intervals are as wide as they say",
                "Each is made of its own sketch alone, and the exact score lies in 95 % of them.",
            ),
            (
                "What is certain is wide",
                "The certain bound holds for every vector there is, so that no pair of the data comes near it; where "
                "it is above 1 it says less than that scores are finite.",
            ),
        ),
        table=table,
        table_caption=f"Means over sketches. An order statistic of sampled tests is to bound {SHARE:.0%} of others.",
        row_name="m",
    )
