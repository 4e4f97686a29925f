"""Faithfulness and utility side by side, for every size and damping: the paper's Figure 3."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from refluence.studies.page import Fact, Picture, StudyPage
from refluence.studies.projection.errors import ErrorMeter
from refluence.studies.projection.output import new_figure, plot_with_band, power, projection_page, series_colors, short
from refluence.studies.projection.study import Study
from refluence.studies.projection.system import SketchedSystem
from refluence.studies.projection.utility import UtilityMeter, UtilityOptions

DROP = 0.01
"""A fall of the LDS by more counts as a violation of its growth with m, as published."""


@dataclass(frozen=True)
class FaithfulnessUtility(UtilityOptions):
    """One run of the study, see `UtilityOptions`.

    Args:
        faithfulness_threshold: a 95 % error up to which scores count as faithful.
        num_test_samples: errors are measured on the first so many of the reported tests.
    """

    NAME = "faithfulness-utility"

    faithfulness_threshold: float = 0.01
    num_test_samples: int = 500


@dataclass(frozen=True, eq=False)
class Meter:
    """Errors and LDS of a system from the same scores.

    Args:
        errors: on the tests at `columns`.
        utility: on all tests.
        columns: tests on which errors are measured.
    """

    errors: ErrorMeter
    utility: UtilityMeter
    columns: Tensor

    def measure(self, system: SketchedSystem) -> dict[str, Tensor]:
        """One row of "errors" a damping; "validation" and "test": LDS at each damping."""
        masks = self.utility.truth.masks.to(system.curvature)
        rows, sums = [], []
        for place, scores in enumerate(system.scores(self.errors.dampings)):
            rows.append(self.errors.row(scores[:, self.columns], place))
            sums.append(masks @ scores)
        return {"errors": torch.tensor(rows, dtype=torch.float64), **self.utility.of_sums(sums)}


def run(
    options: FaithfulnessUtility,
    out: Path,
    *,
    cache_dir: Path | None = None,
    ground_truth: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Do the study in a folder, or what is left of it, and return the content of its `summary.json`.

    Raises:
        DataError: data that is not on this machine; a folder of something else or of other settings.
    """
    study = Study.open(options, out, cache_dir, progress)
    utility = options.meter(study, ground_truth)
    columns = utility.reported[: options.num_test_samples]
    errors = ErrorMeter(study.spectral.with_tests(columns), utility.dampings, corrected=False)
    meter = Meter(errors, utility, columns)
    sizes = options.sizes.below(study.problem.parameters)
    frames = []
    for trial, m, stage in study.measure(options.sketching, sizes, meter.measure):
        frame = errors.frame({"plain": stage.tensors["errors"]}).drop(columns="corrected")
        frame["validation_lds"] = stage.tensors["validation"].numpy()
        frame["test_lds"] = stage.tensors["test"].numpy()
        frames.append(frame.assign(trial=trial, m=m))
    results = pd.concat(frames, ignore_index=True)
    results["faithful"] = results["eps_95"] <= options.faithfulness_threshold
    facts = study.facts(validation_tests=len(utility.validation), reported_tests=len(utility.reported))
    summary = summary_of(facts, results)
    figures = {"faithfulness_utility": grid_figure(results, summary)}
    return study.finish(summary, results, figures, page_of(summary, figures["faithfulness_utility"]))


def summary_of(facts: dict[str, Any], results: pd.DataFrame) -> dict[str, Any]:
    """The content of `summary.json`: flat keys, lists in the order of `m`; the choice of λ never sees a test LDS.

    `best_damping` is the best of the mean validation curve; `…_of_trials` has a list for each m, of each trial's own.
    """
    summary: dict[str, Any] = {**facts, "m": sorted(int(m) for m in results["m"].unique())}
    keys = ("best_damping", "effective_dimension", "validation_lds", "test_lds", "eps_95", "gap_95", "faithful")
    found: dict[str, list[Any]] = {key: [] for key in (*keys, "best_damping_of_trials", "test_lds_of_trials")}
    for m in summary["m"]:
        rows = results[results["m"] == m]
        means = rows.groupby("damping")[
            ["validation_lds", "test_lds", "eps_95", "gap_95", "effective_dimension"]
        ].mean()
        best = means["validation_lds"].idxmax()
        found["best_damping"].append(float(best))
        for key in ("effective_dimension", "validation_lds", "test_lds", "eps_95", "gap_95"):
            found[key].append(float(means.loc[best, key]))
        found["faithful"].append(bool(means.loc[best, "eps_95"] <= facts["faithfulness_threshold"]))
        own = [trial.iloc[int(trial["validation_lds"].argmax())] for _, trial in rows.groupby("trial")]
        found["best_damping_of_trials"].append([float(row["damping"]) for row in own])
        found["test_lds_of_trials"].append([float(row["test_lds"]) for row in own])
    own_means = [float(np.mean(v)) for v in found["test_lds_of_trials"]]
    falls = int((np.diff(own_means) < -DROP).sum())
    return (
        summary
        | found
        | {
            "test_lds_at_own_damping": own_means,
            "lds_falls": falls,
            "damping_rises": int((np.diff(found["best_damping"]) > 0).sum()),
            "correlation_of_log_m_and_lds": float(np.corrcoef(np.log(summary["m"]), own_means)[0, 1])
            if len(own_means) > 2
            else float("nan"),
            "smallest_eps_95_at_best": min(found["eps_95"]),
            "largest_eps_95_at_best": max(found["eps_95"]),
            "faithful_share": float(results["faithful"].mean()),
        }
    )


def grid_figure(results: pd.DataFrame, summary: dict[str, Any]) -> Figure:
    """Error above, LDS below, against λ, one colour a size, with a star at λ*(m)."""
    figure, axes = new_figure(1, 2, width=7.0, height=3.6)
    top, bottom = axes[:, 0]
    top.set(xscale="log", yscale="log", ylabel="95 % error ÷ √τ₀√τ₀")
    bottom.set(xscale="log", xlabel="λ", ylabel="test LDS")
    for place, (m, color) in enumerate(zip(summary["m"], series_colors(len(summary["m"]), "plasma"), strict=True)):
        rows = results[results["m"] == m]
        star = summary["best_damping"][place]
        for ax, column in ((top, "eps_95"), (bottom, "test_lds")):
            table = rows.pivot(index="trial", columns="damping", values=column)
            plot_with_band(ax, table, color=color, linewidth=1.2, label=f"{m:,}")
            ax.plot(
                star, table[star].mean(), "*", color=color, markersize=10, markeredgecolor="black", markeredgewidth=0.4
            )
    top.axhline(summary["faithfulness_threshold"], color="#8a8f98", linewidth=0.8, linestyle="--")
    bottom.legend(frameon=False, fontsize=7, title="m", ncols=2)
    return figure


def page_of(summary: dict[str, Any], figure: Figure) -> StudyPage:
    """The page."""
    table = pd.DataFrame(
        {
            "λ*": [power(v) for v in summary["best_damping"]],
            "m ÷ d_λ*": [short(m / d) for m, d in zip(summary["m"], summary["effective_dimension"], strict=True)],
            "validation LDS": [f"{v:.4f}" for v in summary["validation_lds"]],
            "test LDS": [f"{v:.4f}" for v in summary["test_lds"]],
            "test LDS, each trial at its own λ": [f"{v:.4f}" for v in summary["test_lds_at_own_damping"]],
            "95 % error": [short(v) for v in summary["eps_95"]],
            "95 % error by the gap": [short(v) for v in summary["gap_95"]],
        },
        index=pd.Index([f"{m:,}" for m in summary["m"]]),
    )
    return projection_page(
        title="Does a faithful sketch make useful scores?",
        lead=f"{summary['model']} on {summary['dataset']}: for every size and damping, how far sketched scores are "
        "from the exact ones, and how well they predict models retrained on halves of the data.",
        facts=(
            Fact(
                "Test LDS",
                f"{summary['test_lds'][-1]:.4f}",
                f"at m = {summary['m'][-1]:,}, λ* = {power(summary['best_damping'][-1])}",
            ),
            Fact("Falls of the LDS", str(summary["lds_falls"]), f"of more than {DROP:g} from one size to the next"),
            Fact("Rises of λ*", str(summary["damping_rises"]), "from one size to the next"),
            Fact(
                "95 % error at λ*",
                f"{short(summary['smallest_eps_95_at_best'])} … {short(summary['largest_eps_95_at_best'])}",
                "over the sizes",
            ),
        ),
        pictures=(
            Picture(
                figure,
                "95 % error and test LDS against damping, a line for each sketch size",
                "Means over trials with 95 % intervals. Stars: λ*(m), chosen on the validation tests only. Dashed: the "
                "threshold of faithfulness.",
            ),
        ),
        findings=(
            (
                "A smaller sketch wants more damping",
                f"λ*(m) goes from {power(summary['best_damping'][0])} to {power(summary['best_damping'][-1])}.",
            ),
            (
                "The threshold says little",
                f"{100 * summary['faithful_share']:.0f} % of all scores are within "
                f"{summary['faithfulness_threshold']:g} by the published normaliser, which is dominated by the "
                "smallest eigenvalue that counts. Compare errors with the plateau, or by the gap.",
            ),
        ),
        table=table,
        table_caption=f"λ* by validation on {summary['validation_tests']} tests, all else on the other "
        f"{summary['reported_tests']}; means over trials.",
        row_name="m",
    )
