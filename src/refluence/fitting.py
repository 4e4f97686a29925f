"""From a task and its training data to a plan, a curvature and a prepared solver."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from refluence.accuracy import accurate_plan, grown
from refluence.batches import Batch, Batches, Data
from refluence.curvature import Curvature, OuterCurvature
from refluence.curvature.build import make_curvature
from refluence.curvature.outputs import IndefiniteLossError, root_count
from refluence.damping import DampingChoice
from refluence.distributed.parts_of import budget as memory_budget
from refluence.distributed.parts_of import on_cluster, parts_of, workers
from refluence.distributed.recipe import Recipe, loaded
from refluence.errors import PlanError
from refluence.gradients.blocks import GradientBlock
from refluence.gradients.capture import Capture
from refluence.gradients.outer import OuterBlock
from refluence.gradients.rows import GradientRows
from refluence.planning import ASSUMED_TESTS, Plan, holds_rows, make_plan
from refluence.settings import Settings, model_fingerprint, working_model
from refluence.skipping import bad_rows, good_rows, leaving_out, raises_everywhere, replaced, weights_without
from refluence.solvers import Solver, State
from refluence.solvers.cost import Workload
from refluence.solvers.kfac import KroneckerSolver
from refluence.store.fingerprint import gradients_fingerprint
from refluence.store.held import Report

PROBE_ROWS = 32
FACTOR_BYTES_PER_BATCH = 64 << 20
LARGEST_BATCH = 1024
KEPT_SLACK = 1.05
"""Room for rows that are larger than the probe's, as longer sequences are."""
MOST_OUTPUTS = 256
"""Outputs an example up to which the rows of a GGN may be held; its products need no rows."""
SHARE_FOR_FEATURES = 0.5
SHARE_FOR_SCORES = 0.25
MANY_SCORES = 1 << 30
NONE: Mapping[int, str] = {}


@dataclass(eq=False)
class Fit:
    """What `fit` made."""

    model: nn.Module
    capture: Capture
    curvature: Curvature
    state: State
    plan: Plan
    fingerprint: str
    skipped: dict[int, str] = field(default_factory=dict)

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
    train: Data
    probe: Batch
    skipped: Mapping[int, str]

    def curvature(self, settings: Settings, weights: Tensor | None, q: int | None) -> Curvature:
        """The curvature on the training data, with its share of the memory for what is kept."""
        kept = self.plan.chosen.kept * KEPT_SLACK + self.held_bytes(settings)
        recipe = self.recipe(settings, weights, q)
        parts = parts_of(recipe, self.capture, self.batches, kept / workers(settings.execution))
        if parts is None:
            return recipe.curvature(self.capture, self.batches, kept)
        whole = replace(recipe, stored=None).curvature(self.capture, self.batches, kept)
        whole.lie_in(parts)
        return whole

    def holds_rows(self, settings: Settings) -> bool:
        """Whether whole gradients are held as rows."""
        return settings.execution.keeps and holds_rows(self.plan.chosen.solver)

    def held_bytes(self, settings: Settings) -> float:
        """Bytes of the gradients that are held as rows where they are made."""
        w = self.plan.workload
        return w.n * w.whole_row_bytes if self.holds_rows(settings) and not w.held_elsewhere else 0.0

    def recipe(self, settings: Settings, weights: Tensor | None, q: int | None) -> Recipe:
        """What the train side is made of."""
        w, whole = self.plan.workload, self.holds_rows(settings)
        row = w.bytes_per_row
        if whole:
            row = w.whole_row_bytes if w.held_elsewhere else 0.0
        share = row / max(1.0, row + w.feature_bytes_per_row)
        stored = self.stored(settings)
        size = self.batches.batch_size
        keeps = self.plan.chosen.kept > 0
        return Recipe(settings, self.train, self.probe, size, weights, q, self.skipped, stored, share, whole, keeps)

    def stored(self, settings: Settings) -> dict[str, Any] | None:
        """The fingerprint of the train rows that are to be stored or held elsewhere, None where they are not.

        Raises:
            PlanError: an offload, or rounding, of a solver that holds no rows.
        """
        execution = settings.execution
        if not execution.keeps:
            return None
        if isinstance(self.plan.chosen.solver, KroneckerSolver):
            asked = f"offload={execution.offload!r}" if execution.offload != "none" else ""
            asked = asked or (f"store_dtype={execution.store_dtype}" if execution.store_dtype is not None else "")
            if asked:
                raise PlanError(
                    f"rf.Execution({asked}) is about rows of gradients, and solver {self.plan.solver} holds none: a "
                    "store keeps the sums of its factors, in float64. Leave it out"
                )
        return gradients_fingerprint(settings.task, model_fingerprint(self.capture.model), settings.groups)


def prepare(settings: Settings, train: Data, n_test: int | None, skipped: Mapping[int, str] = NONE) -> Prepared:
    """Probe the gradients and plan the work, without the rows that are left out."""
    source, train = train, loaded(train)
    model = working_model(settings)
    reference = next(model.parameters())
    probe = Batches(train, settings.batch_size or PROBE_ROWS, reference.device, settings.dtype, "train")
    chosen = good_rows(probe, skipped, PROBE_ROWS)
    count = len(chosen)
    first_rows = probe.select(chosen)
    sample = Batches(first_rows, count, reference.device, settings.dtype, "train")
    capture = Capture(settings.task, model, settings.groups, sample if skipped else probe)
    seconds = float("inf")
    for _ in range(2):
        begin = time.perf_counter()
        [(_, blocks)] = list(capture.gradients(sample, capture.loss))
        seconds = min(seconds, time.perf_counter() - begin)
    per_row = sum(block.nbytes for block in blocks.values()) / count
    budget = memory_budget(settings.execution, reference.device)
    q, features_per_row = _features(settings, capture, sample, probe.n, budget)
    fitting = int(FACTOR_BYTES_PER_BATCH / max(1.0, per_row + features_per_row))
    if settings.execution.keeps and isinstance(settings.solver, Solver) and holds_rows(settings.solver):
        whole_row = 4.0 * sum(shape.numel() for shape in capture.shapes.values())
        fitting = int(FACTOR_BYTES_PER_BATCH / max(1.0, per_row + features_per_row, whole_row))
    batch_size = settings.batch_size or max(8, min(LARGEST_BATCH, 1 << max(0, fitting.bit_length() - 1)))
    batches = replaced(Batches(train, batch_size, reference.device, settings.dtype, "train"), skipped)
    dimensions = {
        group: sum(capture.shapes[name].numel() for name in names) for group, names in settings.groups.items()
    }
    d = sum(dimensions.values())
    passed = sum(_forward_work(part) for block in blocks.values() for part in block.blocks)
    inner = sum(block.inner_product_work() for block in blocks.values())
    workload = Workload(
        n=batches.n,
        tests=_tests(n_test, batches.n, budget),
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
        keeps=settings.execution.keeps,
    )
    plan = make_plan(workload, settings.curvature, settings.solver, budget, settings.seed)
    if settings.accuracy is not None and settings.solver == "auto":
        plan = accurate_plan(plan, settings.accuracy, settings.curvature, settings.seed)
    return Prepared(capture, batches, plan, source, first_rows, skipped)


def _tests(asked: int | None, n: int, budget: int) -> int:
    """The tests of a score call: as asked, or some 500, or fewer where so many scores would fill the memory."""
    if asked is not None:
        return asked
    bytes_a_test = 32 * n
    many = bytes_a_test * ASSUMED_TESTS > max(budget, MANY_SCORES)
    return max(1, int(SHARE_FOR_SCORES * budget / bytes_a_test)) if many else ASSUMED_TESTS


def plan_for(settings: Settings, train: Data, n_test: int) -> Plan:
    """What a fit would take."""
    return leaving_out(
        lambda skipped: prepare(settings, train, n_test, skipped).plan,
        lambda most: _bad_rows(settings, train, most),
        settings.execution.skip_bad,
        seen=lambda _: True,
    )


def fit(settings: Settings, train: Data, weights: Sequence[float] | Tensor | None) -> Fit:
    """Prepare the solver on the training data, without its bad examples where these are to be skipped.

    Raises:
        BadExampleError: a bad example, where it is not to be skipped.
        PlanError: the solver does not fit the memory, or cannot do the curvature.
    """
    return leaving_out(
        lambda skipped: _fit(settings, train, weights, skipped),
        lambda most: _bad_rows(settings, train, most),
        settings.execution.skip_bad,
        seen=lambda made: _from_store(settings, made) or made.curvature.total(_not_passed) == 0,
    )


def _from_store(settings: Settings, made: Fit) -> bool:
    """Whether the train gradients, or what was made of them, are from a store, which holds finite ones only."""
    sums = isinstance(made.plan.chosen.solver, KroneckerSolver)
    own = isinstance(made.curvature, OuterCurvature) and made.curvature.own_rows
    return settings.execution.store is not None and (own or not sums)


def _not_passed(part: Curvature) -> int:
    """1 where not all gradients of a part have been made, else 0."""
    return int(not part.rows.passed)


def _bad_rows(settings: Settings, train: Data, most: int | None) -> dict[int, str]:
    model = working_model(settings)
    device = next(model.parameters()).device
    batches = Batches(loaded(train), settings.batch_size or PROBE_ROWS, device, settings.dtype, "train")
    if settings.execution.cluster is None:
        return bad_rows(settings.task, model, batches, settings.progress, most)
    if raises_everywhere(settings.task, model, batches):
        return {}
    recipe = Recipe(settings, train, None, batches.batch_size, None, None, {}, None, 1.0)
    return on_cluster(recipe, batches).bad_rows(most)


def _fit(
    settings: Settings,
    train: Data,
    weights: Sequence[float] | Tensor | None,
    skipped: Mapping[int, str],
) -> Fit:
    prepared = prepare(settings, train, None, skipped)
    prepared.plan.check()
    checked = weights_without(weights, skipped, prepared.batches.n)
    q = prepared.plan.workload.q
    solver = prepared.plan.chosen.solver
    curvature = prepared.curvature(settings, checked, q)
    held = curvature.rows.total(_held) if prepared.holds_rows(settings) else None
    try:
        state = solver.prepare(curvature)
    except IndefiniteLossError:
        # The rows of the GGN are real for a convex loss only; its products exist for every loss.
        if getattr(solver, "needs_rows", False):
            raise
        curvature = prepared.curvature(settings, checked, None)
        state = solver.prepare(curvature)
    if held is not None:
        state.diagnostics["store"] = held.record()
    model, plan = prepared.capture.model, prepared.plan
    if settings.accuracy is not None:
        state, plan = accurate(settings, state, plan, settings.damping)
    return Fit(model, prepared.capture, curvature, state, plan, model_fingerprint(model), dict(sorted(skipped.items())))


def _held(rows: GradientRows) -> Report | None:
    return rows.hold()


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
