"""From the options to an `rf.Influence`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import typer

import refluence as rf
from refluence.accuracy import check_accuracy
from refluence.cli.execution_options import ExecutionChoice
from refluence.cli.options import CurvatureName, DtypeName
from refluence.cli.problem import Problem
from refluence.cli.solver import SolverChoice
from refluence.errors import RefluenceError
from refluence.execution import usable_device

DEFAULT_SAMPLES = 2


@dataclass(frozen=True)
class Method:
    """How influence is computed, as given on the command line."""

    curvature: CurvatureName = CurvatureName.FISHER
    samples: int | None = None
    solver: SolverChoice = field(default_factory=SolverChoice)
    damping: str = "auto"
    device: str | None = None
    dtype: DtypeName | None = None
    batch_size: int | None = None
    execution: ExecutionChoice = field(default_factory=ExecutionChoice)
    seed: int = 0
    progress: bool = True
    accuracy: float | None = None

    def check(self) -> None:
        """Raise typer.BadParameter, or a RefluenceError, for options that cannot be read or do not go together."""
        check_accuracy(self._accuracy(), self.solver.build(self.seed), self.curvature.value)
        if self.samples is not None and self.curvature is not CurvatureName.MC_FISHER:
            raise typer.BadParameter(
                f"is for --curvature mc_fisher, not for {self.curvature.value}", param_hint="--samples"
            )
        self.execution.check_solver(self.solver.wanted)
        parse_damping(self.damping)
        self._device()
        self.execution.check()

    def influence(self, task: rf.Task) -> rf.Influence:
        """An `Influence` that is not fitted yet.

        Raises:
            typer.BadParameter: options that cannot be read or do not go together.
            RefluenceError: what `Influence` refuses.
        """
        return rf.Influence(
            task,
            curvature=self.curvature.value,
            solver=self.solver.build(self.seed),
            damping=parse_damping(self.damping),
            device=self._device(),
            dtype=None if self.dtype is None else getattr(torch, self.dtype.value),
            batch_size=self.batch_size,
            progress=self.progress,
            seed=self.seed,
            execution=self.execution.build(),
            samples=self.samples or DEFAULT_SAMPLES,
            accuracy=self._accuracy(),
        )

    def fit(self, problem: Problem) -> rf.Influence:
        """The `Influence`, fitted to the train rows of the problem.

        Raises:
            typer.BadParameter: workers that lack the user's module.
            RefluenceError: what `Influence` refuses.
        """
        influence = self.influence(problem.task)
        train = problem.rows_for(influence.settings.execution)
        try:
            return influence.fit(train)
        except ModuleNotFoundError as error:
            if self.execution.scheduler is None:
                raise
            raise typer.BadParameter(
                f"the workers of {self.execution.scheduler} have no module {error.name!r}: install it there, or give "
                "--task as path/to/file.py:function, whose file is sent to them",
                param_hint="--scheduler",
            ) from error

    def _accuracy(self) -> rf.Accuracy | None:
        if self.accuracy is None:
            return None
        try:
            return rf.Accuracy(self.accuracy)
        except RefluenceError as error:
            raise typer.BadParameter(str(error), param_hint="--accuracy") from error

    def _device(self) -> torch.device | None:
        if self.device is None:
            return None
        try:
            return usable_device(self.device)
        except RefluenceError as error:
            raise typer.BadParameter(str(error), param_hint="--device") from error


def parse_damping(text: str) -> Any:
    """`auto`, a number, `relative:C` or `dim:K` as what `Influence(damping=...)` takes.

    Raises:
        typer.BadParameter: anything else.
    """
    kind, colon, value = text.strip().partition(":")
    try:
        if kind == "auto" and not colon:
            return "auto"
        if kind == "relative" and colon:
            return rf.RelativeDamping(float(value))
        if kind == "dim" and colon:
            return rf.EffectiveDimension(float(value))
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a damping: use auto, a number such as 1e-3, relative:0.1 or dim:200"
            + (f" ({error})" if isinstance(error, RefluenceError) else ""),
            param_hint="--damping",
        ) from error
