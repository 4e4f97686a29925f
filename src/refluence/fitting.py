"""From a task and its training data to a plan, a curvature and a prepared solver."""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refluence.accuracy import Accuracy, accurate_plan, check_accuracy, grown
from refluence.batches import Batches, Data
from refluence.columns import checked_weights
from refluence.curvature import Curvature
from refluence.curvature.build import CURVATURES, make_curvature
from refluence.curvature.outputs import IndefiniteLossError, root_count
from refluence.damping import DampingChoice
from refluence.errors import PlanError, RefluenceError
from refluence.execution import Execution
from refluence.gradients.blocks import GradientBlock
from refluence.gradients.capture import Capture
from refluence.gradients.outer import OuterBlock
from refluence.gradients.routes import Groups
from refluence.gradients.rows import GradientRows
from refluence.planning import Plan, make_plan
from refluence.solvers import Sketched, Solver, State
from refluence.solvers.cost import Workload
from refluence.store.fingerprint import gradients_fingerprint
from refluence.store.keeping import Keeping
from refluence.task import Task

PROBE_ROWS = 32
FACTOR_BYTES_PER_BATCH = 64 << 20
LARGEST_BATCH = 1024
KEPT_SLACK = 1.05
"""Room for rows that are larger than the probe's, as longer sequences are."""
MOST_OUTPUTS = 256
"""Outputs an example up to which the rows of a GGN may be held; its products need no rows."""
SHARE_FOR_FEATURES = 0.5


@dataclass(frozen=True)
class Settings:
    """What an `Influence` was asked for."""

    task: Task
    curvature: str
    solver: Solver | str
    damping: DampingChoice
    groups: Groups
    device: torch.device | str | None
    dtype: torch.dtype | None
    batch_size: int | None
    progress: bool
    seed: int
    samples: int
    execution: Execution
    accuracy: Accuracy | None = None

    def __post_init__(self) -> None:
        if self.curvature not in CURVATURES:
            raise RefluenceError(
                "curvature must be "
                + ", ".join(f'"{name}"' for name in CURVATURES[:-1])
                + f' or "{CURVATURES[-1]}", not {self.curvature!r}'
            )
        if not isinstance(self.samples, int) or isinstance(self.samples, bool) or self.samples < 1:
            raise RefluenceError(f"samples must be an integer of at least 1, not {self.samples!r}")
        check_accuracy(self.accuracy, self.solver, self.curvature)


@dataclass(eq=False)
class Fit:
    """What `fit` made."""

    model: nn.Module
    capture: Capture
    curvature: Curvature
    state: State
    plan: Plan
    fingerprint: str

    @property
    def rows(self) -> GradientRows:
        """The train gradients."""
        return self.curvature.rows


@dataclass(eq=False)
class Prepared:
    """What is known of the work before it is done."""

    capture: Capture
    batches: Batches
    plan: Plan

    def curvature(self, settings: Settings, weights: Tensor | None, q: int | None) -> Curvature:
        """The curvature on the training data, with its share of the memory for what is kept."""
        w = self.plan.workload
        kept = self.plan.chosen.kept * KEPT_SLACK
        share = w.bytes_per_row / max(1.0, w.bytes_per_row + w.feature_bytes_per_row)
        loss, keeping = self.capture.loss, self.keeping(settings)
        rows = GradientRows(self.capture, self.batches, loss, int(kept * share), settings.progress, keeping=keeping)
        return make_curvature(settings.curvature, rows, weights, q, int(kept * (1 - share)), settings.seed)

    def keeping(self, settings: Settings) -> Keeping | None:
        """How the train rows are held and stored, None where it is where they are made.

        Raises:
            PlanError: a store, or an offload, with another solver than a sketch.
        """
        execution = settings.execution
        if not execution.keeps:
            return None
        solver = self.plan.chosen.solver
        if not isinstance(solver, Sketched):
            asked = f"store={os.fspath(execution.store)!r}" if execution.store else f"offload={execution.offload!r}"
            raise PlanError(
                f"rf.Execution({asked}) is about the projected gradients of solver Sketched, and the solver is "
                f"{self.plan.solver}: use rf.solvers.Sketched(rf.sketches.SJLT(4096)), or leave it out"
            )
        fingerprint = gradients_fingerprint(settings.task, model_fingerprint(self.capture.model), settings.groups)
        return Keeping(execution, fingerprint, by_size=settings.accuracy is not None)


def prepare(settings: Settings, train: Data, n_test: int) -> Prepared:
    """Probe the gradients and plan the work."""
    model = working_model(settings)
    reference = next(model.parameters())
    probe = Batches(train, settings.batch_size or PROBE_ROWS, reference.device, settings.dtype, "train")
    capture = Capture(settings.task, model, settings.groups, probe)
    count = min(PROBE_ROWS, probe.n)
    sample = Batches(probe.select(range(count)), count, reference.device, settings.dtype, "train")
    seconds = float("inf")
    for _ in range(2):
        begin = time.perf_counter()
        [(_, blocks)] = list(capture.gradients(sample, capture.loss))
        seconds = min(seconds, time.perf_counter() - begin)
    per_row = sum(block.nbytes for block in blocks.values()) / count
    budget = settings.execution.budget(reference.device)
    q, features_per_row = _features(settings, capture, sample, probe.n, budget)
    fitting = int(FACTOR_BYTES_PER_BATCH / max(1.0, per_row + features_per_row))
    batch_size = settings.batch_size or max(8, min(LARGEST_BATCH, 1 << max(0, fitting.bit_length() - 1)))
    batches = Batches(train, batch_size, reference.device, settings.dtype, "train")
    dimensions = {
        group: sum(capture.shapes[name].numel() for name in names) for group, names in settings.groups.items()
    }
    d = sum(dimensions.values())
    passed = sum(_forward_work(part) for block in blocks.values() for part in block.blocks)
    inner = sum(block.inner_product_work() for block in blocks.values())
    workload = Workload(
        n=batches.n,
        tests=n_test,
        dimensions=dimensions,
        q=q,
        bytes_per_row=per_row,
        feature_bytes_per_row=features_per_row,
        inner_product_work=inner,
        gradient_seconds=seconds / count,
        product_work=batches.n * (6.0 * passed if q is None else 2.0 * (passed + (q - 1) * min(d, inner))),
        itemsize=reference.element_size(),
        batch_size=batches.batch_size,
        device=reference.device,
        damping=settings.damping,
        offload=settings.execution.offload,
    )
    plan = make_plan(workload, settings.curvature, settings.solver, budget, settings.seed)
    if settings.accuracy is not None and settings.solver == "auto":
        plan = accurate_plan(plan, settings.accuracy, settings.curvature, settings.seed)
    return Prepared(capture, batches, plan)


def fit(settings: Settings, train: Data, weights: Sequence[float] | Tensor | None, n_test: int) -> Fit:
    """Prepare the solver on the training data.

    Raises:
        PlanError: the solver does not fit the memory, or cannot do the curvature.
    """
    prepared = prepare(settings, train, n_test)
    prepared.plan.check()
    checked = None if weights is None else checked_weights(weights, prepared.batches.n)
    q = prepared.plan.workload.q
    solver = prepared.plan.chosen.solver
    curvature = prepared.curvature(settings, checked, q)
    try:
        state = solver.prepare(curvature)
    except IndefiniteLossError:
        # The rows of the GGN are real for a convex loss only; its products exist for every loss.
        if getattr(solver, "needs_rows", False):
            raise
        curvature = prepared.curvature(settings, checked, None)
        state = solver.prepare(curvature)
    model, plan = prepared.capture.model, prepared.plan
    if settings.accuracy is not None:
        state, plan = accurate(settings, state, plan, settings.damping)
    return Fit(model, prepared.capture, curvature, state, plan, model_fingerprint(model))


def accurate(
    settings: Settings, state: State, plan: Plan, damping: DampingChoice, tests: GradientRows | None = None
) -> tuple[State, Plan]:
    """The state and plan, or those of a sketch that is large enough for the accuracy asked for (`grown`)."""
    assert settings.accuracy is not None
    auto = settings.solver == "auto"
    return grown(state, plan, settings.accuracy, damping, settings.task.l2, settings.curvature, tests, auto)


def _forward_work(block: GradientBlock) -> float:
    """Multiply-adds of one example's way through a layer: its parameters, times the positions that use them."""
    positions = sum(term.row.t for term in block.terms) if isinstance(block, OuterBlock) else 1
    return float(positions * block.d)


def _features(settings: Settings, capture: Capture, sample: Batches, n: int, budget: int) -> tuple[int | None, float]:
    """(rows of the curvature an example, None where its products are to be used; memory of one example's rows)."""
    name = settings.curvature
    if name == "fisher":
        return 1, 0.0
    if name == "hessian":
        return None, 0.0
    [(_, batch)] = list(capture.running(sample))
    with capture.ready(), torch.no_grad():
        output = capture.task.output(capture.model, batch)
        outputs = root_count(capture.task, output)
    q = settings.samples if name == "mc_fisher" else outputs
    if name != "mc_fisher" and q > MOST_OUTPUTS:
        return None, 0.0
    rows = GradientRows(capture, sample, capture.loss, 0, progress=False)
    try:
        curvature = make_curvature(name, rows, None, q, 0, settings.seed)
        [(_, blocks)] = list(curvature.features)  # type: ignore[attr-defined]
    except IndefiniteLossError:
        return None, 0.0
    per_row = sum(block.nbytes for block in blocks.values()) / sample.n
    asked = not isinstance(settings.solver, str) and getattr(settings.solver, "needs_rows", False)
    if name != "mc_fisher" and not asked and n * per_row > SHARE_FOR_FEATURES * budget:
        return None, 0.0
    return q, per_row


def working_model(settings: Settings) -> nn.Module:
    """The task's model, or a copy of it where device or dtype ask for another."""
    model = settings.task.model
    parameters = list(model.parameters())
    device = torch.device(settings.device) if settings.device is not None else parameters[0].device
    moved = any(p.device != torch.empty(0, device=device).device for p in parameters)
    if moved or (settings.dtype is not None and any(p.dtype != settings.dtype for p in parameters)):
        return copy.deepcopy(model).to(device=device, dtype=settings.dtype)
    return model


def model_fingerprint(model: nn.Module) -> str:
    """A hash of the architecture as printed and of every parameter and buffer."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
