"""From `--solver` and its settings to an object of `rf.solvers`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import typer

import refluence as rf
from refluence.cli.options import PreconditionerName, SharingName, SketchName, SolverName
from refluence.errors import RefluenceError
from refluence.solvers import preconditioners

DEFAULT_SKETCH_SIZE = 4096

TAKEN_BY: dict[str, tuple[SolverName, ...]] = {
    "sketch": (SolverName.SKETCHED, SolverName.KFAC, SolverName.EKFAC),
    "sketch_size": (SolverName.SKETCHED, SolverName.KFAC, SolverName.EKFAC),
    "rank": (SolverName.ARNOLDI, SolverName.NYSTROEM, SolverName.CG),
    "rtol": (SolverName.CG,),
    "maxiter": (SolverName.CG,),
    "preconditioner": (SolverName.CG,),
    "depth": (SolverName.LISSA,),
    "scale": (SolverName.LISSA,),
    "repeats": (SolverName.LISSA, SolverName.SKETCHED),
    "step_rows": (SolverName.LISSA,),
    "tolerance": (SolverName.LISSA, SolverName.ARNOLDI),
    "sharing": (SolverName.KFAC, SolverName.EKFAC),
}
"""Setting → the solvers that have it."""


@dataclass(frozen=True)
class SolverChoice:
    """`--solver` and the settings that were given; None leaves the solver's own default."""

    solver: SolverName = SolverName.AUTO
    sketch: SketchName | None = None
    sketch_size: int | None = None
    rank: int | None = None
    rtol: float | None = None
    maxiter: int | None = None
    preconditioner: PreconditionerName | None = None
    depth: int | None = None
    scale: float | None = None
    repeats: int | None = None
    step_rows: int | None = None
    tolerance: float | None = None
    sharing: SharingName | None = None

    def build(self, seed: int) -> Any:
        """ "auto", or the solver.

        Raises:
            typer.BadParameter: a setting of another solver, one that is missing, or a value that the solver refuses.
        """
        wanted = self.wanted
        self._check(wanted)
        if wanted is SolverName.AUTO:
            return "auto"
        try:
            return self._make(wanted, seed)
        except RefluenceError as error:
            raise typer.BadParameter(str(error), param_hint=self._hint(wanted)) from error

    @property
    def wanted(self) -> SolverName:
        """A sketch asked for means the sketched solver."""
        if self.solver is SolverName.AUTO and (self.sketch is not None or self.sketch_size is not None):
            return SolverName.SKETCHED
        return self.solver

    def _given(self) -> list[str]:
        return [f.name for f in fields(self) if f.name != "solver" and getattr(self, f.name) is not None]

    def _check(self, wanted: SolverName) -> None:
        for name in self._given():
            if wanted not in TAKEN_BY[name]:
                solvers = " or ".join(solver.value for solver in TAKEN_BY[name])
                raise typer.BadParameter(f"is for the {solvers} solver, not for {wanted.value}", param_hint=flag(name))
        if wanted is SolverName.CG and (self.rank is None) == (self.preconditioner is PreconditionerName.NYSTROEM):
            raise typer.BadParameter(
                "of the cg solver goes with --preconditioner nystroem, which needs it", param_hint="--rank"
            )
        if wanted in (SolverName.ARNOLDI, SolverName.NYSTROEM) and self.rank is None:
            raise typer.BadParameter(f"is needed by the {wanted.value} solver, such as --rank 256", param_hint="--rank")

    def _make(self, wanted: SolverName, seed: int) -> Any:
        solvers = rf.solvers
        makers: dict[SolverName, Callable[[], Any]] = {
            SolverName.GRAM: solvers.Gram,
            SolverName.DENSE: solvers.Dense,
            SolverName.IDENTITY: solvers.Identity,
            SolverName.CG: lambda: solvers.ConjugateGradient(
                **self._settings("rtol", "maxiter"), preconditioner=self._preconditioner(seed)
            ),
            SolverName.LISSA: lambda: solvers.Lissa(
                **self._settings("depth", "scale", "repeats", "tolerance"), batch_size=self.step_rows, seed=seed
            ),
            SolverName.ARNOLDI: lambda: solvers.Arnoldi(**self._settings("rank", "tolerance"), seed=seed),
            SolverName.NYSTROEM: lambda: solvers.Nystroem(**self._settings("rank"), seed=seed),
            SolverName.HARMONIC_MEAN: lambda: solvers.HarmonicMean(),
            SolverName.KFAC: lambda: solvers.Kfac(**self._factors(seed)),
            SolverName.EKFAC: lambda: solvers.Ekfac(**self._factors(seed)),
            SolverName.SKETCHED: lambda: solvers.Sketched(
                self._sketch(SketchName.SJLT, seed), replicates=self.repeats or 1
            ),
        }
        return makers[wanted]()

    def _settings(self, *names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _factors(self, seed: int) -> dict[str, Any]:
        found: dict[str, Any] = {} if self.sharing is None else {"sharing": self.sharing.value}
        if self.sketch is not None or self.sketch_size is not None:
            found["sketch"] = self._sketch(SketchName.KRONECKER, seed)
        return found

    def _sketch(self, default: SketchName, seed: int) -> Any:
        kinds = {
            SketchName.SJLT: rf.sketches.SJLT,
            SketchName.GAUSSIAN: rf.sketches.Gaussian,
            SketchName.RADEMACHER: rf.sketches.Rademacher,
            SketchName.TENSOR: rf.sketches.TensorSketch,
        }
        size, kind = self.sketch_size or DEFAULT_SKETCH_SIZE, self.sketch or default
        if kind is SketchName.KRONECKER:
            side = math.isqrt(size)
            if side**2 != size:
                raise typer.BadParameter(
                    f"of a kronecker sketch is a square, such as {side**2} or {(side + 1) ** 2}, not {size}",
                    param_hint="--sketch-size",
                )
            return rf.sketches.Kronecker(side, side, seed=seed)
        return kinds[kind](size, seed=seed)

    def _preconditioner(self, seed: int) -> Any:
        match self.preconditioner:
            case None:
                return None
            case PreconditionerName.JACOBI:
                return preconditioners.Jacobi()
            case PreconditionerName.NYSTROEM:
                assert self.rank is not None
                return preconditioners.Nystroem(self.rank, seed=seed)
            case PreconditionerName.KFAC:
                return rf.solvers.Kfac()
            case PreconditionerName.EKFAC:
                return rf.solvers.Ekfac()

    def _hint(self, wanted: SolverName) -> str:
        given = [flag(name) for name in self._given()]
        return ", ".join(given) or f"--solver {wanted.value}"


def flag(name: str) -> str:
    """The option of a setting."""
    return f"--{name.replace('_', '-')}"
