"""One subset of the study, stage by stage: the minimum, the predictions, the refits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from refluence.evaluation.agreement import agreement
from refluence.evaluation.convex import leave_one_out, minimise
from refluence.evaluation.newton import newton_removal, newton_steps
from refluence.influence import Influence
from refluence.studies.folder import Stage, StudyFolder
from refluence.studies.leave_one_out.methods import PAPER_SEED, Method, fitted, methods, predicted_changes
from refluence.studies.leave_one_out.settings import TRUNCATED, TRUNCATED_MEAN, Options, Problem, load_problem
from refluence.task import Task

CLASSES = 10
TOLERANCE = 1e-8
OPTIMUM, NEWTON, REFITS = "optimum", "newton", "refits"


@dataclass(frozen=True, eq=False)
class Subset:
    """What one subset of the train rows gave.

    Attributes:
        frame: one row for each removed example.
        statistics: one row for each method (each seed of LiSSA with the paper's parameters is one) and metric.
        facts: stage → its facts.
    """

    index: int
    frame: pd.DataFrame
    statistics: pd.DataFrame
    facts: Mapping[str, Mapping[str, Any]]


def study_subset(folder: StudyFolder, options: Options, index: int, progress: bool) -> Subset:
    """Every stage of a subset; those that are finished are read."""
    run = _Run(folder, options, index, progress)
    stages = dict(run.stages())
    removed = stages[REFITS].tensors["removed"]
    frame = pd.DataFrame(
        {
            "subset": index,
            "rank": range(1, len(removed) + 1),
            "row": run.problem.rows[removed].numpy(),
            "label": run.problem.train[1][removed].numpy(),
            "leverage": stages[NEWTON].tensors["leverage"].numpy(),
            "actual": stages[REFITS].tensors["actual"].numpy(),
            "predicted_newton": stages[NEWTON].tensors["predicted"].numpy(),
            **{
                f"predicted_{method.key}": stages[method.key].tensors["predicted"][removed].numpy()
                for method in run.methods
            },
            **{name: stages[REFITS].tensors[name].numpy() for name in ("gradient_norm", "iterations", "converged")},
        }
    )
    statistics = statistics_of(frame)
    seeds = statistics[(statistics["metric"] == "pearson") & statistics["method"].str.startswith(PAPER_SEED)]
    median = seeds.sort_values("value", kind="stable")["method"].iloc[len(seeds) // 2]
    frame.insert(
        list(frame.columns).index("predicted_newton") + 1, "predicted_lissa_paper", frame[f"predicted_{median}"]
    )
    return Subset(index, frame, statistics.assign(subset=index), {name: s.facts for name, s in stages.items()})


def statistics_of(frame: pd.DataFrame) -> pd.DataFrame:
    """`agreement` of every column "predicted_…" with "actual"."""
    keys = [name.removeprefix("predicted_") for name in frame.columns if name.startswith("predicted_")]
    found = [
        agreement(frame[f"predicted_{key}"].to_numpy(copy=True), frame["actual"].to_numpy(copy=True)).assign(method=key)
        for key in keys
    ]
    return pd.concat(found, ignore_index=True)


@dataclass(eq=False)
class _Run:
    folder: StudyFolder
    options: Options
    index: int
    progress: bool

    @cached_property
    def problem(self) -> Problem:
        """The data."""
        return load_problem(self.options.setting, self.options.seed + self.index)

    @cached_property
    def methods(self) -> list[Method]:
        """The methods but Newton's correction, the one that it goes with first.

        What a published reproduction got by truncation is shown on the first subset only.
        """
        found = methods(self.options.setting, self.options.seed)
        return [method for method in found if self.index == 0 or method.key not in (TRUNCATED, TRUNCATED_MEAN)]

    def stages(self) -> Iterator[tuple[str, Stage]]:
        """(name, stage), in order."""
        optimum = self._stage(OPTIMUM, self._optimum)
        self.task.model.load_state_dict(dict(optimum.tensors))
        self.row = int(optimum.facts["test_row"])
        yield OPTIMUM, optimum
        exact, *others = self.methods
        found = self._stage(exact.key, lambda: self._predict(exact))
        yield exact.key, found
        order = found.tensors["predicted"].abs().argsort(descending=True, stable=True)
        self.removed = order[: self.options.top]
        yield NEWTON, self._stage(NEWTON, self._newton)
        yield REFITS, self._stage(REFITS, self._refit)
        self.__dict__.pop("exact", None)
        for method in others:
            yield method.key, self._stage(method.key, lambda method=method: self._predict(method))

    def _stage(self, name: str, work: Any) -> Stage:
        return self.folder.stage(f"subset{self.index}/{name}", work)

    @cached_property
    def task(self) -> Task:
        """With the model that `stages` fills in."""
        model = nn.Linear(self.problem.varying, CLASSES, bias=self.options.setting.bias, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return Task(model, l2=self.options.setting.l2)

    @cached_property
    def exact(self) -> Influence:
        """The first method, fitted once for all stages that use it."""
        return self._fitted(self.methods[0])

    def _fitted(self, method: Method) -> Influence:
        return fitted(self.task, self.problem, method, self.progress)

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """The test image, and its label."""
        x, y = self.problem.test
        return x[self.row : self.row + 1], y[self.row : self.row + 1]

    def _optimum(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        model = minimise(self.task, self.problem.train, tolerance=TOLERANCE, progress=self.progress)
        x, y = self.problem.test
        with torch.no_grad():
            predictions = model(x).argmax(dim=1)
        wrong = (predictions != y).nonzero()[:, 0]
        row = self.options.setting.test if self.options.setting.test is not None else int(wrong[0])
        facts = {
            "examples": len(self.problem.rows),
            "pixels": self.problem.pixels,
            "varying_pixels": self.problem.varying,
            "parameters": CLASSES * (self.problem.pixels + self.options.setting.bias),
            "test_accuracy": 1 - len(wrong) / len(y),
            "test_row": row,
            "test_label": int(y[row]),
            "test_prediction": int(predictions[row]),
        }
        return dict(model.state_dict()), facts

    def _predict(self, method: Method) -> tuple[dict[str, Tensor], dict[str, Any]]:
        influence = self.exact if method is self.methods[0] else self._fitted(method)
        predicted = predicted_changes(influence, self.test)
        facts = {name: value for name, value in influence.diagnostics.items() if isinstance(value, (int, float, str))}
        facts |= {name: v for name, v in influence.diagnostics.items() if name in ("iterations", "residual", "scale")}
        return {"predicted": predicted}, facts

    def _newton(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        found = newton_removal(self.exact, self.test, self.removed.tolist(), progress=self.progress)
        return {"predicted": found.changes[0], "leverage": found.leverage}, {"gradient_norm": self.exact.gradient_norm}

    def _refit(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        rows = self.removed.tolist()
        start = torch.cat([p.detach().flatten() for p in self.task.model.parameters()])
        truth = leave_one_out(
            self.task,
            self.problem.train,
            self.test,
            rows,
            start=start + newton_steps(self.exact, rows, progress=self.progress),
            influence=self.exact,
            tolerance=TOLERANCE,
            path=self.folder.part(f"subset{self.index}/{REFITS}"),
            progress=self.progress,
        )
        with torch.no_grad():
            before = self.task.losses(self.task.model(self.test[0]), self.test)
        assert truth.baseline is not None
        drift = float(truth.baseline["loss"].mean() - before)
        manifest = truth.manifest
        tensors = {
            "removed": self.removed,
            "actual": truth.changes()[:, 0],
            "gradient_norm": torch.tensor(manifest["gradient_norms"], dtype=torch.float64),
            "iterations": torch.tensor(manifest["iterations"]),
            "converged": torch.tensor(manifest["converged"]),
        }
        facts = {
            "baseline_change": drift,
            "largest_gradient_norm": max(manifest["gradient_norms"]),
            "converged": int(sum(manifest["converged"])),
            "removals": len(rows),
            "test_loss": float(before),
        }
        return tensors, facts
