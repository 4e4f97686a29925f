"""The study from start to end: subsets, numbers, pictures, page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from refluence.studies.folder import REPORT, RESULTS, SUMMARY, StudyFolder
from refluence.studies.leave_one_out.figure import leverage_figure, save, scatter_figure
from refluence.studies.leave_one_out.findings import findings
from refluence.studies.leave_one_out.methods import TITLES
from refluence.studies.leave_one_out.outcome import shown, summary_of, table_of
from refluence.studies.leave_one_out.settings import Options
from refluence.studies.leave_one_out.subset import OPTIMUM, Subset, study_subset
from refluence.studies.page import Fact, Picture, StudyPage, render

NAME = "leave-one-out"
SOURCE = "P. W. Koh and P. Liang, Understanding black-box predictions via influence functions, ICML 2017, Figure 2."
COLUMNS = {
    "pearson": "Pearson",
    "spearman": "Spearman",
    "slope": "slope",
    "r2": "R² about y = x",
    "within_sign": "Pearson within a sign",
    "rmse_over_sd": "error ÷ spread",
}


def run(options: Options, out: str | Path, *, progress: bool = True) -> dict[str, Any]:
    """Do the study in a folder, or what is left of it, and return the content of its `summary.json`.

    Writes `summary.json`, `results.parquet` (one row a removed example), `statistics.parquet` (one row a method and
    metric, with intervals), `figure.png` and `.svg`, `leverage.png` and `.svg`, `report.html`.

    Raises:
        DataError: the data set is not on this machine; a folder of something else or of other settings.
    """
    folder = StudyFolder(Path(out), NAME, options.record())
    folder.begin()
    subsets = [study_subset(folder, options, index, progress) for index in range(options.subsets)]
    summary = summary_of(options, subsets)
    folder.write_frame(RESULTS, pd.concat([subset.frame for subset in subsets], ignore_index=True))
    statistics = pd.concat([subset.statistics for subset in subsets], ignore_index=True)
    folder.write_frame("statistics.parquet", statistics[["subset", "method", "metric", "value", "low", "high", "n"]])
    scatter = scatter_figure(subsets[0].frame, table_of(subsets[:1]), shown(subsets[0]))
    leverage = leverage_figure(subsets[0].frame, ("exact", "newton"))
    save(folder, "figure", scatter)
    save(folder, "leverage", leverage)
    folder.write_text(REPORT, render(_page(options, subsets, summary, scatter, leverage)))
    folder.write_json(SUMMARY, summary)
    folder.write_manifest("complete", facts=[dict(subset.facts) for subset in subsets])
    return summary


def _page(
    options: Options, subsets: Sequence[Subset], summary: dict[str, Any], scatter: Figure, leverage: Figure
) -> StudyPage:
    first, table = subsets[0], table_of(subsets)
    about = first.facts[OPTIMUM]
    which = f"; medians over {len(subsets)} subsets" if len(subsets) > 1 else ""
    panels = " The panels show the first subset." if len(subsets) > 1 else ""
    return StudyPage(
        title="Does removing an example do what its influence says?",
        lead=f"{options.setting.title}. The {options.top} train examples with the largest predicted effect on the loss "
        "of one test image were removed, each alone, and the model was refitted without it.",
        facts=(
            Fact("Train examples", f"{summary['n']:,}", f"{options.setting.name} setting{which}"),
            Fact(
                "Parameters",
                f"{summary['parameters']:,}",
                f"l2 = {options.setting.l2:g}; {about['varying_pixels']} of {about['pixels']} pixels ever vary",
            ),
            Fact(
                "Test image",
                f"row {about['test_row']}",
                f"a {about['test_label']}, predicted {about['test_prediction']}; "
                f"test accuracy {100 * about['test_accuracy']:.1f} %",
            ),
            Fact(
                "Refits",
                f"{summary['refits_converged']:,} of {summary['refits']:,}",
                f"reached a gradient norm of 1e-8; the largest is {summary['largest_gradient_norm']:.1e}",
            ),
            Fact(
                "Leverage",
                f"{summary['mean_leverage']:.3g}",
                f"mean over the removed examples; the largest is {summary['largest_leverage']:.2g}",
            ),
            Fact("Time", f"{summary['seconds']:,.0f} s", "all stages, on this machine"),
        ),
        pictures=(
            Picture(
                scatter,
                "Scatter plots of predicted against actual change of the test loss, one for each method",
                "Each point is one removed example; blue ones help (the loss rises without them), orange ones harm. "
                "The line is y = x." + panels,
            ),
            Picture(
                leverage,
                "Relative error of the exact influence and of the Newton-corrected one against leverage",
                "Influence errs the more, the higher the leverage of the removed example. The Newton step corrects "
                "for it.",
            ),
        ),
        findings=findings(options.setting, table, first.facts, first.frame),
        table=table.rename(index=TITLES, columns=COLUMNS).map(_number),
        table_caption="Over the removed examples"
        + which
        + ". Slope: least squares of predicted on actual. Examples picked by the size of their influence form two "
        "clusters, one of each sign, so that Pearson's correlation alone flatters: see the slope and the correlation "
        "within a sign.",
        source=f"After {SOURCE}",
    )


def _number(value: float) -> str:
    return f"{value:.6f}" if 0.999 < value < 1 else f"{value:.4f}"
