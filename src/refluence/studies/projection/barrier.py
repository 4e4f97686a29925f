"""The barrier at λ = 0: what a sketch of m rows loses of the undamped scores, against m over the rank (Theorem 1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from matplotlib.figure import Figure
from scipy.linalg import qr
from torch import Tensor

from refluence.errors import DataError
from refluence.studies.page import Fact, Picture, StudyPage
from refluence.studies.projection.errors import STATISTICS, statistics
from refluence.studies.projection.grid import Sketching
from refluence.studies.projection.output import (
    GUIDE,
    MARK,
    new_figure,
    plot_with_band,
    projection_page,
    short,
    table_of,
)
from refluence.studies.projection.spectral import Spectral
from refluence.studies.projection.study import Study, StudyOptions
from refluence.studies.projection.system import SketchedSystem

INJECTIVE = 1e-8
"""Singular values of the sketched directions below this share of the largest count as lost."""
FLOOR = 1e-16


@dataclass(frozen=True)
class Barrier(StudyOptions):
    """One run of the study.

    Args:
        problem: data set and model.
        sketching: projection and trials.
        ratio_max: the largest m, in ranks.
        ratio_steps: sizes, equally spaced up to it; the rank itself and its neighbours are added.

    Raises:
        DataError: no sizes.
    """

    NAME = "barrier"

    sketching: Sketching = field(default_factory=Sketching)
    ratio_max: float = 1.2
    ratio_steps: int = 12

    def __post_init__(self) -> None:
        if not (self.ratio_max > 0 and self.ratio_steps > 0):
            raise DataError(f"ratio_max and ratio_steps must be > 0, not {self.ratio_max!r} and {self.ratio_steps!r}")

    def sizes(self, rank: int, d: int) -> list[int]:
        """Ascending, below d."""
        spaced = {round(rank * self.ratio_max * step / self.ratio_steps) for step in range(1, self.ratio_steps + 1)}
        return sorted(m for m in spaced | {rank - 1, rank, rank + 1} if 0 < m < d)


@dataclass(frozen=True, eq=False)
class BarrierMeter:
    """What is lost of the scores at λ = 0 of gradients in range(F), whose rank is that of `Spectral.cut`.

    With g = F^{1/2}u the exact score is uᵀu', the sketched one uᵀΠu', Π the projection on the rows of PF^{1/2}.
    """

    spectral: Spectral

    def measure(self, system: SketchedSystem) -> dict[str, Tensor]:
        """What one sketch loses.

        "lost" is rank − rank(PU), "mean" and "largest" the share of τ_0 missing of train gradients, "eps" the errors of
        pairs.
        """
        rank = self.spectral.cut
        factor = self._factor(system)
        directions = factor / self.spectral.roots[:rank, None]
        # eigenvalues of the smaller side, squares of singular values
        gram = directions @ directions.T if directions.shape[1] >= rank else directions.T @ directions
        values = torch.linalg.eigvalsh(gram)
        kept = int((values > INJECTIVE**2 * values[-1]).sum())
        left = self.spectral.basis[:, :rank]
        basis = _column_space(factor, kept)
        missing = 1 - (left @ basis).square().sum(dim=1) / left.square().sum(dim=1)
        tests = (self.spectral.tests[:, :rank] / self.spectral.roots[:rank]).T
        outside = tests - basis @ (basis.T @ tests)
        errors = (self.spectral.n**0.5 * left @ outside).abs_()
        train, own = (squares.sqrt() for squares in self.spectral.tau_0())
        known = own > 0
        errors = errors[:, known] / train[:, None] / own[known]
        weights = left.square().sum(dim=1)
        return {
            "lost": torch.tensor(rank - kept),
            "mean": (missing * weights).sum() / weights.sum(),
            "largest": missing.max(),
            "eps": torch.tensor(statistics(errors.flatten()), dtype=torch.float64),
        }

    def _factor(self, system: SketchedSystem) -> Float64[Tensor, "r m"]:
        """(PF^{1/2})ᵀ in F's eigenvectors, up to a rotation of the sketch's rows."""
        basis, rank = self.spectral.basis[:, : self.spectral.cut], self.spectral.cut
        if not system.dual:
            assert system.left is not None
            return basis.T @ system.left / self.spectral.n**0.5
        values, vectors = torch.linalg.eigh(system.curvature)
        root = vectors * values.clamp(min=0.0).sqrt()
        return root[:rank] if system.left is not None else basis.T @ root


def _column_space(factor: Float64[Tensor, "r m"], rank: int) -> Float64[Tensor, "r q"]:
    """An orthonormal basis of the columns of a factor whose rows fall in size.

    Householder's QR keeps the small rows, where an eigendecomposition of a Gram matrix would lose them.
    """
    if rank >= factor.shape[0]:
        return torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    if rank < factor.shape[1]:
        # columns beyond the rank repeat others up to rounding: pivoting leaves them out
        found, _, _ = qr(factor.cpu().numpy(), mode="economic", pivoting=True)
        return torch.from_numpy(found[:, :rank].copy()).to(factor.device)
    return torch.linalg.qr(factor)[0]


def run(options: Barrier, out: Path, *, cache_dir: Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Do the study in a folder, or what is left of it, and return the content of its `summary.json`.

    Raises:
        DataError: data that is not on this machine; a folder of something else or of other settings.
    """
    study = Study.open(options, out, cache_dir, progress)
    rank, meter = study.spectral.cut, BarrierMeter(study.spectral)
    sizes = options.sizes(rank, study.problem.parameters)
    rows = []
    for trial, m, stage in study.measure(options.sketching, sizes, meter.measure):
        found = stage.tensors
        rows.append(
            {
                "trial": trial,
                "m": m,
                "m_over_rank": m / rank,
                "lost": int(found["lost"]),
                "self_mean": float(found["mean"]),
                "self_max": float(found["largest"]),
                **{f"eps_{name}": float(v) for name, v in zip(STATISTICS, found["eps"], strict=True)},
            }
        )
    results = pd.DataFrame(rows)
    summary = summary_of(study.facts(rank=rank), results)
    figures = {"barrier": barrier_figure(results)}
    return study.finish(summary, results, figures, page_of(summary, figures["barrier"]))


def summary_of(facts: dict[str, Any], results: pd.DataFrame) -> dict[str, Any]:
    """The content of `summary.json`: flat keys, lists in the order of `m`, means over trials."""
    means = results.groupby("m").mean()
    below = means[means.index < facts["rank"]]
    above = means[means.index >= facts["rank"]]
    return {
        **facts,
        "m": [int(m) for m in means.index],
        **{name: means[name].tolist() for name in ("lost", "self_mean", "self_max", "eps_95", "eps_max")},
        "largest_departure_from_the_line": float((below["self_mean"] - (1 - below.index / facts["rank"])).abs().max())
        if len(below)
        else float("nan"),
        "largest_error_from_the_rank_on": float(above["eps_max"].max()) if len(above) else float("nan"),
        "smallest_error_below_the_rank": float(below["eps_max"].min()) if len(below) else float("nan"),
    }


def barrier_figure(results: pd.DataFrame) -> Figure:
    """What is missing of self-influence, and the errors of pairs, against m over the rank."""
    figure, axes = new_figure(2)
    left, right = axes[0]
    for column, label, color in (
        ("self_mean", "mean over train examples", "#0a5c9e"),
        ("self_max", "largest", "#c8640f"),
    ):
        table = results.pivot(index="trial", columns="m_over_rank", values=column)
        plot_with_band(left, table, color=color, marker="o", markersize=3, label=label)
    ends = np.array([0.0, 1.0])
    left.plot(ends, 1 - ends, color=GUIDE, linewidth=0.9, linestyle="--", label="1 − m/rank")
    left.set(xlabel="m ÷ rank", ylabel="share of τ₀(g, g) that is lost", ylim=(-0.03, 1.05))
    right.set_yscale("log")
    for column, label, color in (("eps_95", "95 %", "#0a5c9e"), ("eps_max", "largest", "#c8640f")):
        table = results.pivot(index="trial", columns="m_over_rank", values=column).clip(lower=FLOOR)
        plot_with_band(right, table, color=color, marker="o", markersize=3, label=label)
    right.set(xlabel="m ÷ rank", ylabel="|error| ÷ √τ₀√τ₀ of pairs, λ = 0")
    for ax in (left, right):
        ax.axvline(1.0, color=MARK, linewidth=0.9, linestyle="--")
        ax.legend(frameon=False, fontsize=8)
    return figure


def page_of(summary: dict[str, Any], figure: Figure) -> StudyPage:
    """The page."""
    columns = {
        "directions lost": "lost",
        "self-influence lost, mean": "self_mean",
        "largest": "self_max",
        "95 % error": "eps_95",
        "largest error": "eps_max",
    }
    table = table_of(summary, columns, "m")
    return projection_page(
        title="Without damping, is there any small sketch?",
        lead=f"{summary['model']} on {summary['dataset']}: undamped scores of gradients in the range of the empirical "
        f"Fisher, whose rank is {summary['rank']:,}, over {summary['num_trials']} {summary['proj_type']} sketches.",
        facts=(
            Fact("Rank", f"{summary['rank']:,}", f"eigenvalues above {summary['rank_cut']:g} of the largest"),
            Fact("Below it", short(summary["smallest_error_below_the_rank"]), "smallest largest error of a pair"),
            Fact("From it on", short(summary["largest_error_from_the_rank_on"]), "largest error of a pair"),
            Fact("Off the line", short(summary["largest_departure_from_the_line"]), "mean loss less 1 − m/rank"),
        ),
        pictures=(
            Picture(
                figure,
                "Share of self-influence lost, and errors of pairs, against sketch size over rank",
                "Means over trials with 95 % intervals. Red: m = rank.",
            ),
        ),
        findings=(
            (
                "Every missing row costs its share",
                "τ̃₀ is the score of what the sketch's m rows span. The mean of the self-influence lost is 1 − m/rank "
                "for every sketch of full rank; only from m = rank on are the scores exact.",
            ),
        ),
        table=table,
        table_caption="Means over trials; errors in units of √τ₀√τ₀. Below 1e-8 is rounding.",
        row_name="m",
    )
