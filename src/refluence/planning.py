"""Memory and time before the work starts, and what `solver="auto"` chooses and why."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

import torch

from refluence.damping import Damping, auto_dimension
from refluence.errors import PlanError
from refluence.execution import format_bytes
from refluence.sketches import SJLT
from refluence.sketches.memory import sketch_cache_bytes
from refluence.solvers import Dense, Gram, Identity, Sketched, Solver
from refluence.solvers.sketched import FEATURE_ROWS

ASSUMED_TESTS = 500
SMALLEST_SKETCH = 256
EXACT_WORK = {"cpu": 2e13, "cuda": 5e15}
"""Multiply-adds up to which "auto" prefers exact scores: some ten minutes of two CPU cores, or of one GPU."""
EXACT_SLOWDOWN = 5.0
IN_FLIGHT = 4.0
"""Memory of a batch in work over that of the gradients kept of it: activations, output gradients and copies."""
EIGENVALUES_WORK = 8.0
"""Time of LAPACK's symmetric eigenvalues over that of n³/3 multiply-adds of a Cholesky factorisation, measured."""


@dataclass(frozen=True)
class Workload:
    """What the work is: sizes, and what a probe of the gradients measured."""

    n: int
    tests: int
    dimensions: dict[str, int]
    bytes_per_row: float
    inner_product_work: float
    gradient_seconds: float
    itemsize: int
    batch_size: int
    device: torch.device
    damping: Damping

    @property
    def d(self) -> int:
        """All attributed parameters."""
        return sum(self.dimensions.values())


@dataclass(frozen=True)
class Estimate:
    """Memory (bytes, of which `kept` for gradients that further passes then need not make), work and time."""

    solver: Solver
    memory: float
    kept: float
    work: float
    seconds: float

    @property
    def name(self) -> str:
        """The solver for people."""
        if isinstance(self.solver, Sketched):
            return f"Sketched({self.solver.sketch!r})"
        return type(self.solver).__name__


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
        return self.chosen.memory <= self.budget

    def check(self) -> None:
        """Refuse a plan that does not fit.

        Raises:
            PlanError: with the alternatives that fit.
        """
        if self.fits:
            return
        fitting = [e for e in self.alternatives if e.memory <= self.budget]
        others = "; ".join(f"solver {e.name} takes {format_bytes(e.memory)}" for e in fitting) or (
            "no other solver fits either: attribute fewer parameters or examples, or use a smaller sketch"
        )
        raise PlanError(
            f"solver {self.solver} needs {format_bytes(self.memory)} but {format_bytes(self.budget)} may be used: "
            f"{others}; or raise rf.Execution(memory=...)"
        )

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
            fits = "" if e.memory <= self.budget else ", does not fit"
            lines.append(f"alternative  {e.name}: {format_bytes(e.memory)}, about {format_seconds(e.seconds)}{fits}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def make_plan(workload: Workload, solver: Solver | str, budget: int) -> Plan:
    """Estimate every solver and take the one asked for, or choose.

    Raises:
        PlanError: an unknown solver.
    """
    candidates = [estimate(Gram(), workload, budget), estimate(Dense(), workload, budget), _sketched(workload, budget)]
    if not isinstance(solver, str):
        if not isinstance(solver, (Gram, Dense, Sketched, Identity)):
            raise PlanError(f'solver must be "auto" or an object from rf.solvers, not {solver!r}')
        others = tuple(e for e in candidates if type(e.solver) is not type(solver))
        return Plan(estimate(solver, workload, budget), "as asked for", workload, budget, others)
    if solver != "auto":
        raise PlanError(
            f'unknown solver {solver!r}: use "auto" or an object from rf.solvers, such as rf.solvers.Gram()'
        )
    gram, dense, sketched = candidates
    # Chosen by counted work and not by measured time, so that the same problem gets the same solver on a busy machine.
    exact = min((e for e in (gram, dense) if e.memory <= budget), key=lambda e: e.work, default=None)
    if exact is None:
        chosen, reason = sketched, "no exact solver fits the memory"
    elif exact.work > max(EXACT_WORK.get(workload.device.type, 2e13), EXACT_SLOWDOWN * sketched.work):
        chosen, reason = sketched, f"the exact one, {exact.name}, would take {format_seconds(exact.seconds)}"
    else:
        side = "n × n Gram matrix" if exact is gram else "d × d curvature"
        chosen, reason = exact, f"exact, and the {side} is the cheaper of the exact ones that fit"
    return Plan(chosen, reason, workload, budget, tuple(e for e in candidates if e is not chosen))


def default_sketch(workload: Workload) -> SJLT:
    """An SJLT with four rows or more for each effective dimension that the automatic damping leaves."""
    wanted = 4 * auto_dimension(workload.n, workload.d)
    return SJLT(max(SMALLEST_SKETCH, 1 << max(0, int(wanted - 1)).bit_length()))


def _sketched(workload: Workload, budget: int) -> Estimate:
    """The default sketch, or the largest smaller one that fits and can still hold the automatic damping."""
    sketch = default_sketch(workload)
    result = estimate(Sketched(sketch), workload, budget)
    while result.memory > budget and sketch.m // 2 >= max(SMALLEST_SKETCH, 2 * auto_dimension(workload.n, workload.d)):
        sketch = SJLT(sketch.m // 2)
        result = estimate(Sketched(sketch), workload, budget)
    return result


def estimate(solver: Solver, w: Workload, budget: int) -> Estimate:
    """Memory (bytes), work (multiply-adds) and time (seconds) of fit and one score call.

    Counts multiply-adds in float64, at the measured rate, and the passes over the gradients.
    """
    rate = multiply_adds_per_second(str(w.device))
    kept = w.n * w.bytes_per_row
    test_rows = w.tests * w.bytes_per_row
    scores = 8.0 * w.n * w.tests * 2
    blocks = len(w.dimensions)
    spectral = 1.0 if isinstance(w.damping, float) else 1.0 + EIGENVALUES_WORK
    passes = 1.0
    if isinstance(solver, Gram):
        fixed = blocks * 16.0 * w.n**2 + 8.0 * w.n**2 + scores + test_rows
        passes = _passes(kept, budget - fixed)
        work = w.inner_product_work * w.n * (w.n / 2 + w.tests) + blocks * (spectral * w.n**3 / 3 + w.n**2 * w.tests)
    elif isinstance(solver, Dense):
        fixed = sum(16.0 * d**2 for d in w.dimensions.values()) + 8.0 * max(w.dimensions.values()) ** 2
        fixed += scores + w.tests * w.d * 8.0 + w.batch_size * w.d * (8.0 + w.itemsize)
        passes = 1.0 if kept <= budget - fixed else 2.0
        work = sum(spectral * d**3 / 3 + w.n * d**2 + d**2 * w.tests for d in w.dimensions.values())
        work += w.n * w.d * w.tests
    elif isinstance(solver, Sketched):
        side, m = min(solver.sketch.m, w.n), solver.sketch.m
        fixed = blocks * (16.0 * side**2 + w.n * m * (max(4, w.itemsize) + (8.0 if m > w.n else 0.0)))
        fixed += 8.0 * side**2 + scores + 8.0 * (min(w.n, FEATURE_ROWS) + w.tests) * m
        kept = 0.0
        per_entry = solver.sketch.nonzeros * 4.0 if isinstance(solver.sketch, SJLT) else float(m)
        work = (w.n + w.tests) * w.d * per_entry
        work += blocks * (w.n * m * side + (1.0 + EIGENVALUES_WORK) * side**3 / 3 + w.n * m * w.tests)
    else:
        fixed = scores + test_rows
        work = w.inner_product_work * w.n * w.tests
    in_flight = IN_FLIGHT * w.bytes_per_row * w.batch_size
    fixed += in_flight + (sketch_cache_bytes(solver.sketch, w.d) if isinstance(solver, Sketched) else 0.0)
    kept = min(kept, max(0.0, budget - fixed))
    memory = fixed + kept
    seconds = w.gradient_seconds * (w.n * passes + w.tests) + work / rate
    return Estimate(solver, memory, kept, work, seconds)


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
