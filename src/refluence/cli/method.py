"""From the options to an `rf.Influence`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import typer

import refluence as rf
from refluence.cli.options import DtypeName, SketchName, SolverName
from refluence.errors import RefluenceError

DEFAULT_SKETCH_SIZE = 4096


@dataclass(frozen=True)
class Method:
    """How influence is computed, as given on the command line."""

    solver: SolverName = SolverName.AUTO
    sketch: SketchName | None = None
    sketch_size: int | None = None
    damping: str = "auto"
    device: str | None = None
    dtype: DtypeName | None = None
    batch_size: int | None = None
    memory: str | None = None
    seed: int = 0
    progress: bool = True

    def check(self) -> None:
        """Raise typer.BadParameter, or a RefluenceError, for options that cannot be read or do not go together."""
        self._solver()
        parse_damping(self.damping)
        self._device()

    def influence(self, task: rf.Task) -> rf.Influence:
        """An `Influence` that is not fitted yet.

        Raises:
            typer.BadParameter: options that cannot be read or do not go together.
            RefluenceError: what `Influence` refuses.
        """
        return rf.Influence(
            task,
            solver=self._solver(),
            damping=parse_damping(self.damping),
            device=self._device(),
            dtype=None if self.dtype is None else getattr(torch, self.dtype.value),
            batch_size=self.batch_size,
            progress=self.progress,
            seed=self.seed,
            execution=None if self.memory is None else rf.Execution(memory=self.memory),
        )

    def _solver(self) -> Any:
        wants_sketch = self.sketch is not None or self.sketch_size is not None
        if self.solver is SolverName.SKETCHED or (self.solver is SolverName.AUTO and wants_sketch):
            kinds = {
                SketchName.SJLT: rf.sketches.SJLT,
                SketchName.GAUSSIAN: rf.sketches.Gaussian,
                SketchName.RADEMACHER: rf.sketches.Rademacher,
            }
            kind = kinds[self.sketch or SketchName.SJLT]
            return rf.solvers.Sketched(kind(self.sketch_size or DEFAULT_SKETCH_SIZE, seed=self.seed))
        if wants_sketch:
            raise typer.BadParameter(
                f"--sketch and --sketch-size are for the sketched solver, not for {self.solver.value}",
                param_hint="--sketch",
            )
        if self.solver is SolverName.AUTO:
            return "auto"
        exact = {
            SolverName.GRAM: rf.solvers.Gram,
            SolverName.DENSE: rf.solvers.Dense,
            SolverName.IDENTITY: rf.solvers.Identity,
        }
        return exact[self.solver]()

    def _device(self) -> torch.device | None:
        if self.device is None:
            return None
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise typer.BadParameter(
                f"device {self.device!r} cannot be used here: {reason}", param_hint="--device"
            ) from error
        return device


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
