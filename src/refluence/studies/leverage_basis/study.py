"""The study from start to end: stages, numbers, pictures, page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from refluence.studies.folder import REPORT, RESULTS, SUMMARY, StudyFolder
from refluence.studies.leave_one_out.figure import save
from refluence.studies.leverage_basis.agreement import group_means, pair_frame, top_of
from refluence.studies.leverage_basis.bases import KINDS, RAW
from refluence.studies.leverage_basis.figures import (
    accuracy_figure,
    artefact_figure,
    curve_figure,
    digits_figure,
    heatmap_figure,
    label_figure,
    overlap_figure,
)
from refluence.studies.leverage_basis.findings import findings
from refluence.studies.leverage_basis.options import Options
from refluence.studies.leverage_basis.outcome import basis_frame, intervals, summary_of
from refluence.studies.leverage_basis.trainings import NETWORK
from refluence.studies.leverage_basis.work import Work
from refluence.studies.page import Fact, Picture, StudyPage, render

NAME = "leverage-basis"
TITLE = "Which images have high leverage, in which basis, and does training on them pay?"
SOURCE = (
    'After "Investigating the Impact of Basis Quality on Leverage-Based Sample Selection". A: trained to classify, '
    "B: to regress one-hot labels, C: not trained; the checkpoints published with it have these letters permuted."
)
CAPTIONS = {
    "accuracy": (
        "Test accuracy against the number of selected rows, a panel for each model and family of arms",
        "Means over seeds with 95 % Student intervals. Rows are chosen from the train images alone. The networks "
        "shuffle their rows and take the same number of steps at every k.",
    ),
    "heatmaps": (
        "Heatmaps of Kendall's τ and chance-corrected overlap between all bases",
        "All images, train and test together. 1 is the same ranking, 0 that of chance.",
    ),
    "overlap": (
        "Share of common images among the k highest leverages against k, with the band of chance",
        "Means over the pairs of two groups with different seeds. The grey band is what independent rankings have in "
        "common.",
    ),
    "curves": ("Sorted leverages of all bases on log scales", "Five seeds of a network have one colour."),
    "digits": (
        "Images of highest and lowest leverage in a basis of every group",
        "Plain leverage; 300 images each, from left to right, then down.",
    ),
    "labels": (
        "Histograms of the labels of the images of highest leverage",
        "Bars are means over seeds, dots single seeds.",
    ),
    "artefact": (
        "The 300 images of highest leverage by unpivoted QR and by the right one, and both leverage curves",
        "Raw pixels. A pixel that is 0 in every image makes unpivoted QR give some image a leverage of 1.",
    ),
}


def run(options: Options, out: str | Path, *, progress: bool = True) -> dict[str, Any]:
    """Do the study in a folder, or what is left of it, and return the content of its `summary.json`.

    Writes `summary.json`, `results.parquet` (one row a training), `accuracy.parquet` (means with intervals),
    `agreement.parquet` (one row a pair of bases), `groups.parquet` (means of groups with intervals), `bases.parquet`,
    figures as PNG and SVG, and `report.html`.

    Raises:
        DataError: the data set is not on this machine; a folder of something else or of other settings; a basis whose
            rank is not above the effective dimension.
    """
    folder = StudyFolder(Path(out), NAME, options.record())
    folder.begin()
    work = Work(folder, options, progress)
    accuracies = work.accuracies()
    table = intervals(accuracies)
    agreement = {kind: stage.tensors for kind, stage in work.agreement.items()}
    means = pd.concat([group_means(kind, agreement[kind], work.bases) for kind in KINDS], ignore_index=True)
    artefact = work.artefact
    basis = basis_frame(work.bases, work.facts)
    n, n_train = len(work.images.labels), work.images.n_train
    summary = summary_of(options, n, n_train, work.sizes, basis, table, means, artefact.facts)
    summary["seconds"] = sum(float(facts.get("seconds", 0.0)) for facts in work.facts.values())
    folder.write_frame(RESULTS, accuracies)
    folder.write_frame("accuracy.parquet", table)
    pairs = pd.concat([pair_frame(kind, agreement[kind], work.bases) for kind in KINDS], ignore_index=True)
    folder.write_frame("agreement.parquet", pairs)
    folder.write_frame("groups.parquet", means)
    folder.write_frame("bases.parquet", basis)
    figures = _figures(work, table, agreement)
    for name, figure in figures.items():
        save(folder, name, figure)
    told = findings(table, means, basis, artefact.facts, work.arms, work.sizes, top_of(n))
    folder.write_text(REPORT, render(_page(work, accuracies, table, summary, told, figures)))
    folder.write_json(SUMMARY, summary)
    folder.write_manifest("complete")
    return summary


def _figures(work: Work, table: pd.DataFrame, agreement: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
    scores = {kind: work.scores(kind) for kind in KINDS}
    images, plain = work.images, scores["plain"]
    n = len(images.labels)
    shown = [basis for basis in work.bases if basis.seed in (0, 1)]
    return {
        "accuracy": accuracy_figure(table, work.arms),
        "heatmaps": heatmap_figure(agreement, work.bases, top_of(n)),
        "overlap": overlap_figure(agreement, work.bases, n),
        "curves": curve_figure(scores, work.bases),
        "digits": digits_figure(images, plain, shown),
        "labels": label_figure(plain, images.labels, work.bases, top_of(n), "plain"),
        "artefact": artefact_figure(images, work.artefact.tensors["wrong"], plain[RAW]),
    }


def _page(
    work: Work,
    accuracies: pd.DataFrame,
    table: pd.DataFrame,
    summary: Mapping[str, Any],
    told: Sequence[tuple[str, str]],
    figures: Mapping[str, Figure],
) -> StudyPage:
    options = work.options
    own = table[table["model"] == NETWORK].assign(title=lambda t: t["arm"].map({a.name: a.title for a in work.arms}))
    shown = own.pivot(index="title", columns="k", values="mean").loc[list(dict.fromkeys(own["title"]))]
    return StudyPage(
        title=TITLE,
        lead=f"{summary['n']:,} images of {options.dataset} in {len(work.bases)} bases: pixels, random features, and "
        "the hidden layer of networks trained to classify (A), to regress one-hot labels (B), and not at all (C), "
        f"{options.seeds} seeds each. Leverage x_iᵀ(XᵀX + nλI)⁺x_i in float64, plain (λ = 0) and with the ridge at "
        f"which d_λ = {options.dimension:g} in every basis.",
        facts=(
            Fact("Images", f"{summary['n']:,}", f"{summary['n_train']:,} of them train images"),
            Fact("Raw pixels", f"rank {summary['rank_raw_smallest']}", f"of {work.images.pixels.shape[1]} columns"),
            Fact("Trainings", f"{len(accuracies):,}", "networks and linear heads on selected rows"),
            Fact("Work", f"{summary['seconds']:,.0f} s", "of all stages; networks are trained side by side"),
        ),
        pictures=[Picture(figure, *CAPTIONS[name]) for name, figure in figures.items()],
        findings=told,
        findings_title="What the numbers say",
        table=shown.rename(columns=lambda k: f"k = {k:,}").map(lambda v: "" if pd.isna(v) else f"{100 * v:.1f}"),
        table_caption="Test accuracy in % of the small network, the mean over seeds.",
        row_name="Rows",
        source=SOURCE,
    )
