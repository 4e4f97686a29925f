"""The convolutional panel of the figure: a small network on a tenth of MNIST, with refits held to where it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from refluence.curvature import Curvature
from refluence.evaluation.newton import inverse_products, newton_removal
from refluence.evaluation.refitting import refits
from refluence.execution import Execution
from refluence.influence import Influence
from refluence.progress import track
from refluence.solvers import ConjugateGradient, Dense, State
from refluence.solvers.cost import Cost, Workload
from refluence.studies.folder import REPORT, RESULTS, SUMMARY, Stage, StudyFolder
from refluence.studies.leave_one_out.figure import save, scatter_figure
from refluence.studies.leave_one_out.methods import TITLES
from refluence.studies.leave_one_out.network import (
    ConvolutionalOptions,
    HeldLosses,
    Images,
    load_images,
    trained,
)
from refluence.studies.leave_one_out.subset import statistics_of
from refluence.studies.page import Fact, Picture, StudyPage, render
from refluence.task import Task

NAME = "leave-one-out"
SETTING = "cnn"
METHODS = ("cg", "ggn", "newton")
RTOL = 1e-2
"""Of the Hessian's inverse: a hundredth of the error that the figure shows."""
TOLERANCE = 2e-3
"""Gradient norm of a refit, as a share of what removing the example adds to the gradient."""
CONVERGED = 0.02
MAXITER = 40
COLUMNS = {"pearson": "Pearson", "spearman": "Spearman", "slope": "slope", "r2": "R² about y = x"}
WITHIN = {"within_sign": "Pearson within a sign", "rmse_over_sd": "error ÷ spread"}


@dataclass(frozen=True)
class _Fitted:
    """The inverse of one influence as the preconditioner of another on the same parameters."""

    state: State

    def prepare(self, curvature: Curvature) -> State:
        return self.state

    def restore(self, curvature: Curvature, tensors: dict[str, Tensor]) -> State:
        return self.state

    def cost(self, w: Workload) -> Cost:
        return Cost(0.0, 0.0, 0.0)


def run_convolutional(options: ConvolutionalOptions, out: str | Path, *, progress: bool = True) -> dict[str, Any]:
    """Do the panel in a folder, or what is left of it, and return the content of its `summary.json`.

    The network is trained by Adam. For the test image, influence by the Hessian plus λ (conjugate gradients, as in the
    paper), by the Gauss–Newton matrix plus λ, and Newton-corrected, predict the change from each removal. The
    examples of largest |influence| by the Hessian are then removed, each alone, and `HeldLosses` minimised from the
    trained weights.

    Raises:
        DataError: MNIST is not on this machine; a folder of something else or of other settings.
        SolverError: the Hessian plus λ has negative curvature: train for more steps.
    """
    folder = StudyFolder(Path(out), NAME, {"format": 1, "setting_name": SETTING, **asdict(options)})
    folder.begin()
    panel = _Panel(folder, options, progress)
    frame = panel.frame()
    statistics = statistics_of(frame)
    table = statistics.pivot(index="method", columns="metric", values="value").loc[list(METHODS)]
    summary = _summary(panel, frame, table)
    folder.write_frame(RESULTS, frame)
    folder.write_frame("statistics.parquet", statistics[["method", "metric", "value", "low", "high", "n"]])
    figure = scatter_figure(frame, table, METHODS)
    save(folder, "figure", figure)
    folder.write_text(REPORT, render(_page(panel, frame, table, summary, figure)))
    folder.write_json(SUMMARY, summary)
    folder.write_manifest("complete", facts=dict(panel.facts))
    return summary


@dataclass(eq=False)
class _Panel:
    folder: StudyFolder
    options: ConvolutionalOptions
    progress: bool

    def __post_init__(self) -> None:
        self.facts: dict[str, Mapping[str, Any]] = {}

    @cached_property
    def images(self) -> Images:
        return load_images(self.options)

    @cached_property
    def task(self) -> Task:
        return Task(trained(self.folder, self.images, self.options, self.progress), l2=self.options.l2)

    @cached_property
    def held(self) -> HeldLosses:
        # The refits write into a copy: the influences keep the model.

        return HeldLosses(copy.deepcopy(self.task.model), self.images.train, self.options.l2, self.options.damping)

    @cached_property
    def ggn(self) -> Influence:
        return self._influence("ggn", Dense())

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        x, y = self.images.test
        return x[self.options.test : self.options.test + 1], y[self.options.test : self.options.test + 1]

    def frame(self) -> pd.DataFrame:
        """One row a removed example."""
        cg = self._stage("cg", lambda: self._predicted(self._hessian))
        ggn = self._stage("ggn", lambda: self._predicted(lambda: self.ggn))
        removed = cg.tensors["predicted"].abs().argsort(descending=True, stable=True)[: self.options.top]
        newton = self._stage("newton", lambda: self._newton(removed))
        rows = [
            self._stage(f"refits/{i}", partial(self._refit, int(i)))
            for i in track(removed.tolist(), "refitting", enabled=self.progress)
        ]
        facts = pd.DataFrame([row.facts for row in rows])
        return pd.DataFrame(
            {
                "rank": range(1, len(removed) + 1),
                "row": self.images.rows[removed].numpy(),
                "label": self.images.train[1][removed].numpy(),
                "actual": facts["actual"].to_numpy(),
                "predicted_cg": cg.tensors["predicted"][removed].numpy(),
                "predicted_ggn": ggn.tensors["predicted"][removed].numpy(),
                "predicted_newton": newton.tensors["predicted"].numpy(),
                "leverage": newton.tensors["leverage"].numpy(),
                "gradient_norm": facts["gradient_norm"].to_numpy(),
                "iterations": facts["iterations"].to_numpy(),
                "converged": (facts["gradient_norm"] <= CONVERGED).to_numpy(),
            }
        )

    def _stage(self, name: str, work: Any) -> Stage:
        found = self.folder.stage(name, work)
        self.facts[name] = found.facts
        return found

    def _influence(self, curvature: str, solver: Any) -> Influence:
        damping, train = self.options.damping, self.images.train
        return Influence(self.task, curvature, solver, damping, progress=self.progress).fit(train)

    def _hessian(self) -> Influence:
        return self._influence("hessian", ConjugateGradient(RTOL, preconditioner=_Fitted(self.ggn._fitted().state)))

    def _predicted(self, make: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """s_testᵀ(∇ℓ_i + l2·θ)/n for every train example."""
        influence = make()
        scores = influence.score(self.test).values[0].double()
        share = self.options.l2 * float(influence.inverse_hvp(self.test)[0] @ self.held.start)
        known = ("residual", "iterations")
        facts = {name: value for name, value in influence.diagnostics.items() if name in known}
        return {"predicted": (scores + share) / influence.n_train}, {
            **facts,
            "gradient_norm": influence.gradient_norm,
            "gradient_rms": influence.gradient_rms,
        }

    def _newton(self, removed: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        found = newton_removal(self.ggn, self.test, removed.tolist(), progress=self.progress)
        return {"predicted": found.changes[0], "leverage": found.leverage}, {}

    def _refit(self, row: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        held, options = self.held, self.options
        step = partial(inverse_products, self.ggn)
        _, gradient = held.of_sets(held.start[None], [[row]])
        added = float((gradient[0] + options.l2 * held.start).norm()) / (held.n - 1)
        start, execution = held.start, Execution()
        args = held, [[row]], step, start, options.l2, TOLERANCE * added, MAXITER, execution, False
        [(_, found)] = list(refits(*args))
        before, after = (held.losses_at(theta, self.test)[0] for theta in (start, found.parameters[0]))
        return {"moved": (found.parameters[0] - start).norm()[None]}, {
            "actual": float(after - before),
            "gradient_norm": float(found.gradient_norms[0]) / added,
            "iterations": int(found.iterations[0]),
        }

    @cached_property
    def accuracies(self) -> tuple[float, float, int, int]:
        """(train, test accuracy, label and prediction of the test image)."""
        model = self.task.model
        with torch.no_grad():
            right = [
                float((model(x).argmax(dim=1) == y).double().mean()) for x, y in (self.images.train, self.images.test)
            ]
            predicted = int(model(self.test[0]).argmax())
        return right[0], right[1], int(self.test[1]), predicted


def _summary(panel: _Panel, frame: pd.DataFrame, table: pd.DataFrame) -> dict[str, Any]:
    train, test, label, predicted = panel.accuracies
    seconds = {name: facts.get("seconds", 0.0) for name, facts in panel.facts.items()}
    refitting = sum(value for name, value in seconds.items() if name.startswith("refits/"))
    return {
        **{
            str(key): {str(name): float(value) for name, value in row.items()}
            for key, row in table.to_dict("index").items()
        },
        "study": NAME,
        "setting": SETTING,
        "dataset": "mnist",
        **{key: value for key, value in asdict(panel.options).items() if key not in ("top", "test")},
        "parameters": panel.held.d,
        "test_row": panel.options.test,
        "test_label": label,
        "test_prediction": predicted,
        "train_accuracy": train,
        "test_accuracy": test,
        "gradient_norm": panel.facts["cg"]["gradient_norm"],
        "removed": len(frame),
        "refits": len(frame),
        "refits_converged": int(frame["converged"].sum()),
        "largest_relative_gradient_norm": float(frame["gradient_norm"].max()),
        "seconds_refits": refitting,
        "seconds": float(sum(seconds.values())),
    }


def _page(panel: _Panel, frame: pd.DataFrame, table: pd.DataFrame, summary: dict[str, Any], figure: Any) -> StudyPage:
    options = panel.options
    shown = table.rename(index=TITLES, columns=COLUMNS | WITHIN)[[*COLUMNS.values(), *WITHIN.values()]]
    moved = np.median(np.abs(frame["actual"] / frame["predicted_cg"]))
    pearson, slope = ({str(key): float(table[name].to_dict()[key]) for key in METHODS} for name in ("pearson", "slope"))
    return StudyPage(
        title="Does removing an example do what its influence says? A convolutional network",
        lead=f"A convolutional network of {summary['parameters']:,} parameters on {options.n:,} images of MNIST. The "
        f"{len(frame)} train examples with the largest predicted effect on the loss of one test image were removed, "
        "each alone, and the network refitted from its weights.",
        facts=(
            Fact("Train examples", f"{options.n:,}", f"train accuracy {100 * summary['train_accuracy']:.1f} %"),
            Fact("Parameters", f"{summary['parameters']:,}", f"l2 = {options.l2:g}, damping {options.damping:g}"),
            Fact(
                "Test image",
                f"row {options.test}",
                f"a {summary['test_label']}, predicted {summary['test_prediction']}; "
                f"test accuracy {100 * summary['test_accuracy']:.1f} %",
            ),
            Fact("Training", f"{options.steps:,} steps", f"gradient norm {summary['gradient_norm']:.1e} at the end"),
            Fact(
                "Refits",
                f"{summary['refits_converged']} of {len(frame)}",
                f"reached {CONVERGED:.0%} of the gradient that the removal adds",
            ),
        ),
        pictures=(
            Picture(
                figure,
                "Scatter plots of predicted against actual change of the test loss, one for each method",
                "Each point is one removed example; blue ones help (the loss rises without them), orange ones harm. "
                "The line is y = x.",
            ),
        ),
        findings=(
            (
                "What was refitted",
                "The training objective without the example, held to the trained weights: its gradient there is "
                "taken off, because the training stopped short of a minimum, and (λ/2)‖θ − θ̂‖² is added with the λ of "
                "the prediction. Such a refit has an answer that does not depend on an optimiser's path. The paper "
                "trained on for 30,000 steps instead, which mixes the removal with more training.",
            ),
            (
                TITLES["cg"],
                "The paper's prediction: the Hessian of the training objective plus λ. Its Pearson correlation is "
                f"{pearson['cg']:.3f}; the paper has 0.86. Actual changes are {moved:.2g} times the "
                "predicted ones in the median, because the Hessian that inverts still holds the removed example.",
            ),
            (
                TITLES["newton"],
                "The Gauss–Newton matrix without the removed example: Pearson "
                f"{pearson['newton']:.3f}, slope {slope['newton']:.2f}, against "
                f"{pearson['ggn']:.3f} and {slope['ggn']:.2f} with it.",
            ),
        ),
        table=shown.map(lambda value: f"{value:.4f}"),
        table_caption=f"Over the {len(frame)} removed examples. Slope: least squares of predicted on actual.",
        source="After P. W. Koh and P. Liang, Understanding black-box predictions via influence functions, ICML 2017, "
        "Figure 2, right.",
    )
