"""Memory and time before the work starts, and what `solver="auto"` chooses and why."""

from __future__ import annotations

import time
from dataclasses import MISSING, dataclass, fields, replace
from functools import lru_cache

import torch

from refluence.damping import auto_dimension
from refluence.errors import PlanError
from refluence.execution import format_bytes
from refluence.sketches import SJLT
from refluence.solvers import ConjugateGradient, Dense, Gram, Sketched, Solver
from refluence.solvers.cost import Workload
from refluence.solvers.kfac import KroneckerSolver

ASSUMED_TESTS = 500
SMALLEST_SKETCH = 256
EXACT_WORK = {"cpu": 2e13, "cuda": 5e15}
"""Multiply-adds up to which "auto" prefers exact scores: some ten minutes of two CPU cores, or of one GPU."""
EXACT_SLOWDOWN = 5.0
IN_FLIGHT = 4.0
"""Memory of a batch in work over that of the gradients kept of it: activations, output gradients and copies."""


@dataclass(frozen=True)
class Estimate:
    """Memory (bytes, of which `kept` for gradients that further passes then need not make), work and time."""

    solver: Solver
    memory: float
    kept: float
    work: float
    seconds: float
    why_not: str | None = None

    @property
    def name(self) -> str:
        """The solver for people, with the settings that are not its defaults."""
        return solver_name(self.solver)

    def fits(self, budget: int) -> bool:
        """Whether the solver can do it, within the memory."""
        return self.why_not is None and self.memory <= budget


@dataclass(frozen=True)
class Plan:
    """What will be done, why, and what it takes."""

    chosen: Estimate
    reason: str
    workload: Workload
    budget: int
    alternatives: tuple[Estimate, ...]

    @property
    def solver(self) -> str:
        """The chosen solver for people."""
        return self.chosen.name

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.chosen.memory

    @property
    def seconds(self) -> float:
        """Estimated time of fit and one score call."""
        return self.chosen.seconds

    @property
    def fits(self) -> bool:
        """Whether the memory is within the budget."""
        return self.chosen.fits(self.budget)

    def check(self) -> None:
        """Refuse a plan that does not fit.

        Raises:
            PlanError: with the alternatives that fit.
        """
        if self.fits:
            return
        if self.chosen.why_not is not None:
            raise PlanError(f"solver {self.solver} cannot do this: {self.chosen.why_not}")
        fitting = [e for e in self.alternatives if e.fits(self.budget)]
        others = "; ".join(f"solver {e.name} takes {format_bytes(e.memory)}" for e in fitting) or (
            "no other solver fits either: attribute fewer parameters or examples, or use a smaller sketch"
        )
        raise PlanError(
            f"solver {self.solver} needs {format_bytes(self.memory)} but {format_bytes(self.budget)} may be used: "
            f"{self._mapped()}{others}; or raise rf.Execution(memory=...)"
        )

    def _mapped(self) -> str:
        """The remedy of a mapped file, where held rows are what does not fit."""
        w, solver = self.workload, self.chosen.solver
        if not (w.keeps and holds_rows(solver)) or w.held_elsewhere:
            return ""
        if not estimate(solver, replace(w, offload="disk"), self.budget).fits(self.budget):
            return ""
        return f'rf.Execution(offload="disk") holds the {w.n:,} × {w.d:,} train gradients in a mapped file; '

    def summary(self) -> str:
        """Several lines for people."""
        w = self.workload
        lines = [
            f"solver       {self.solver}: {self.reason}",
            f"work         n = {w.n:,} train, {w.tests:,} test examples, d = {w.d:,} parameters"
            + (f" in {len(w.dimensions)} blocks" if len(w.dimensions) > 1 else "")
            + f", batches of {w.batch_size}, on {w.device}",
            f"memory       {format_bytes(self.memory)} of {format_bytes(self.budget)} that may be used",
            f"time         about {format_seconds(self.seconds)}",
        ]
        for e in self.alternatives:
            if e.why_not is not None:
                lines.append(f"alternative  {e.name}: not possible, {e.why_not}")
                continue
            fits = "" if e.memory <= self.budget else ", does not fit"
            lines.append(f"alternative  {e.name}: {format_bytes(e.memory)}, about {format_seconds(e.seconds)}{fits}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def make_plan(workload: Workload, curvature: str, solver: Solver | str, budget: int, seed: int = 0) -> Plan:
    """Estimate every solver that "auto" considers and take the one asked for, or choose.

    Raises:
        PlanError: an unknown solver.
    """
    exact = [estimate(candidate, workload, budget) for candidate in exact_solvers(curvature)]
    sketched = _sketched(workload, budget, seed)
    candidates = [*exact, sketched]
    if not isinstance(solver, str):
        if not isinstance(solver, Solver) or isinstance(solver, type):
            raise PlanError(f'solver must be "auto" or an object from rf.solvers, not {solver!r}')
        others = tuple(e for e in candidates if type(e.solver) is not type(solver))
        return Plan(estimate(solver, workload, budget), "as asked for", workload, budget, others)
    if solver != "auto":
        raise PlanError(
            f'unknown solver {solver!r}: use "auto" or an object from rf.solvers, such as rf.solvers.Gram()'
        )
    # Chosen by counted work and not by measured time, so that the same problem gets the same solver on a busy machine.
    best = min((e for e in exact if e.fits(budget)), key=lambda e: e.work, default=None)
    if best is None:
        chosen, reason = sketched, "no exact solver fits the memory"
    elif best.work > max(EXACT_WORK.get(workload.device.type, 2e13), EXACT_SLOWDOWN * sketched.work):
        chosen, reason = sketched, f"the exact one, {best.name}, would take {format_seconds(best.seconds)}"
    else:
        chosen, reason = best, f"{EXACT_BY[type(best.solver)]} the cheapest of the exact solvers that fit"
    return Plan(chosen, reason, workload, budget, tuple(e for e in candidates if e is not chosen))


EXACT_BY = {
    Gram: "exact by the Gram matrix of the rows,",
    Dense: "exact by the d × d curvature,",
    ConjugateGradient: "exact to a stated residual,",
}


def exact_solvers(curvature: str) -> list[Solver]:
    """The solvers that are exact on a curvature, or to a tolerance, of which "auto" takes the cheapest."""
    if curvature in ("fisher", "mc_fisher"):
        return [Gram(), Dense()]
    if curvature == "hessian":
        return [Dense(), ConjugateGradient()]
    return [Gram(), Dense(), ConjugateGradient()]


def solver_name(solver: Solver) -> str:
    """A solver for people, with the settings that are not its defaults."""
    given = []
    for field in fields(solver):  # type: ignore[arg-type]
        value = getattr(solver, field.name)
        if field.default is MISSING:
            given.append(repr(value))
        elif value != field.default:
            given.append(f"{field.name}={value!r}")
    return type(solver).__name__ + (f"({', '.join(given)})" if given else "")


def default_sketch(workload: Workload, seed: int = 0) -> SJLT:
    """An SJLT with four rows or more for each effective dimension that the automatic damping leaves."""
    wanted = 4 * auto_dimension(workload.n, workload.d)
    return SJLT(max(SMALLEST_SKETCH, 1 << max(0, int(wanted - 1)).bit_length()), seed=seed)


def holds_rows(solver: Solver) -> bool:
    """Whether a solver takes whole train gradients, which a store or an offload then holds as rows."""
    return not isinstance(solver, (Sketched, KroneckerSolver))


def _sketched(workload: Workload, budget: int, seed: int) -> Estimate:
    """The default sketch, or the largest smaller one that fits and can still hold the automatic damping."""
    sketch = default_sketch(workload, seed)
    result = estimate(Sketched(sketch), workload, budget)
    while result.memory > budget and sketch.m // 2 >= max(SMALLEST_SKETCH, 2 * auto_dimension(workload.n, workload.d)):
        sketch = SJLT(sketch.m // 2, seed=seed)
        result = estimate(Sketched(sketch), workload, budget)
    return result


def estimate(solver: Solver, w: Workload, budget: int) -> Estimate:
    """Memory (bytes), work (multiply-adds) and time (seconds) of fit and one score call.

    Counts multiply-adds in float64, at the measured rate, and the passes over the gradients.
    """
    held = 0.0
    whole = w.keeps and holds_rows(solver)
    if whole:
        w = replace(w, bytes_per_row=w.whole_row_bytes, inner_product_work=float(w.d))
        held = 0.0 if w.held_elsewhere else w.n * w.whole_row_bytes
    cost = solver.cost(w)
    if cost.why_not is not None:
        return Estimate(solver, 0.0, 0.0, float("inf"), float("inf"), cost.why_not)
    fixed = cost.fixed + held + IN_FLIGHT * (w.bytes_per_row + w.feature_bytes_per_row) * w.batch_size
    wanted = max(0.0, cost.kept - held)
    kept = min(wanted, max(0.0, budget - fixed))
    passes = 1.0
    # Held rows are read again, and rows of the curvature made.
    if kept < wanted and (not whole or w.feature_bytes_per_row > 0):
        passes = _passes(wanted, budget - fixed) if cost.tiled else cost.passes
    # A row of a GGN takes another backward pass, which is some half of a gradient's two.
    gradients = w.gradient_seconds * (1.0 + (w.q or 1) / 2 - 0.5)
    rate = multiply_adds_per_second(str(w.device))
    seconds = gradients * w.n * passes + w.gradient_seconds * w.tests + cost.work / rate
    return Estimate(solver, fixed + kept, kept, cost.work, seconds)


def _passes(kept: float, room: float) -> float:
    """Passes over the train gradients for an n×n matrix when only `room` bytes of them can be kept."""
    if kept <= room:
        return 1.0
    tiles = kept / max(room, kept / 1000)
    return 1.0 + tiles / 2


@lru_cache
def multiply_adds_per_second(device: str) -> float:
    """The measured rate of float64 matrix products on a device."""
    size = 768
    matrix = torch.ones(size, size, dtype=torch.float64, device=device)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - begin)
    return size**3 / best


def format_seconds(seconds: float) -> str:
    """A duration for people."""
    if seconds < 1:
        return "a second"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"
