"""Newton-corrected removal: one Newton step with the Hessian of the examples that are left.

Axis letters: m removals, s examples removed together, q rows of the GGN an example, k tests, d parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.batches import Batches, Data
from refluence.curvature.products import output_products
from refluence.errors import PlanError, SolverError
from refluence.evaluation.removed_features import RemovedRows
from refluence.evaluation.subsets import removed_rows
from refluence.execution import format_bytes
from refluence.influence import Influence
from refluence.progress import track
from refluence.solvers.state import Shifts

COLUMN_BYTES = 512 << 20
"""Memory for the right-hand sides of the removals that are solved for together."""
COPIES = 4
"""Of an entry: the rows, their solutions, and what the solver needs for itself."""
VECTORS = 32
"""Steps that go through the model together."""
LARGEST_LEVERAGE = 1 - 1e-9
PROBED = 8

Removal = int | Sequence[int]
Step = dict[str, Tensor]
"""Block → (m, d_b)."""


@dataclass(frozen=True, eq=False)
class Removals:
    """What removing examples is predicted to do.

    Attributes:
        removed: the train rows of each removal.
        changes: (k, m), Newton-corrected change of each test's measurement.
        first_order: (k, m), the change that influence predicts, with the l2 term's share of the removed examples.
        leverage: (m,), tr M = tr F A⁻¹Fᵀ/n of the removed examples' rows: 0 where the correction does nothing.
    """

    removed: tuple[tuple[int, ...], ...]
    changes: Float64[Tensor, "k m"]
    first_order: Float64[Tensor, "k m"]
    leverage: Float64[Tensor, " m"]

    def __repr__(self) -> str:
        tests, removals = self.changes.shape
        return f"Removals({removals} removals, {tests} tests, leverage up to {float(self.leverage.max()):.3g})"

    def to_frame(self) -> pd.DataFrame:
        """One row for each removal and test: removed (row, or tuple of rows), test, change, first_order, leverage."""
        k, m = self.changes.shape
        names = np.empty(m, dtype=object)
        names[:] = [rows[0] if len(rows) == 1 else rows for rows in self.removed]
        return pd.DataFrame(
            {
                "removed": pd.Series(np.repeat(names, k)).infer_objects(),
                "test": np.tile(np.arange(k), m),
                "change": self.changes.T.reshape(-1).numpy(),
                "first_order": self.first_order.T.reshape(-1).numpy(),
                "leverage": np.repeat(self.leverage.numpy(), k),
            }
        )


def newton_removal(
    influence: Influence, test: Data, removals: Sequence[Removal] | None = None, *, progress: bool = True
) -> Removals:
    """The change of each test's measurement where examples are removed, by one Newton step with the Hessian left.

    The objective without the examples S is (1/n) Σ_{j∉S} [w_j ℓ_j + (l2/2)‖θ‖²]: each example carries its share of the
    l2 term. With A = C + λI + l2(1 − s/n)I, F the removed examples' rows of the GGN (FᵀF = Σ_S w_i J_iᵀ(∂²ℓ_i)J_i),
    u = Σ_S (w_i ∇ℓ_i + l2 θ) and M = F A⁻¹Fᵀ/n, the step from a stationary point is

        Δθ = (A − FᵀF/n)⁻¹ u/n = (1/n) [A⁻¹u + A⁻¹Fᵀ (I − M)⁻¹ F A⁻¹u / n],

    and the change is measurement(outputs + J Δθ) − measurement(outputs). For a model that is linear in its parameters
    with a quadratic loss it is exact. Where the model is not at a stationary point, only the removal's own part is
    predicted, not what more training would do anyway. With blocks C and FᵀF are both block-diagonal.

    Takes a solve for each of the q rows of every removed example and one of its own, and one for each test.

    Args:
        influence: fitted with curvature "ggn", or "hessian" for a model that is linear in its parameters; any solver
            but Identity. What the solver approximates in C is approximated here too.
        test: the test examples.
        removals: train rows, or sequences of train rows that are removed together; None: each train example alone.
        progress: whether a long computation shows a bar.

    Raises:
        DataError: rows that do not exist, or all of them removed together.
        PlanError: another curvature, a model whose Hessian is not that of its outputs, rows that do not fit the memory.
        SolverError: an example without which the damped curvature is not positive (leverage ≥ 1).
        TaskError: a loss whose Hessian in the outputs is not positive.

    Source: Rad & Maleki, A scalable estimate of the out-of-sample prediction error via approximate leave-one-out,
    JRSS B 2020; Rubinstein & Hopkins, Rescaled influence functions, arXiv 2506.06656.
    """
    removed = removed_rows(range(influence.n_train) if removals is None else removals, influence.n_train)
    tests = influence._test_rows(test)
    fit = influence._fitted()
    directions = fit.state.inverse_hvp(tests, influence.shifts)
    outputs = _Outputs(influence, tests.batches)
    m = len(removed)
    changes = torch.zeros(tests.n, m, dtype=torch.float64)
    first_order, leverage = torch.zeros_like(changes), torch.zeros(m, dtype=torch.float64)
    for some, steps in _steps(influence, removed, progress):
        changes[:, some] = outputs.changes(steps.step).cpu()
        own = sum((directions[block].double() @ u.T for block, u in steps.gradient.items()), torch.zeros(()))
        first_order[:, some] = own.cpu() / influence.n_train
        leverage[some] = steps.leverage.cpu()
    return Removals(tuple(removed), changes, first_order, leverage)


def newton_steps(
    influence: Influence, removals: Sequence[Removal] | None = None, *, progress: bool = False
) -> Float64[Tensor, "m d"]:
    """Δθ of `newton_removal`, in the order of `task.parameter_names()`: where to begin a refit.

    A removal of nothing has the step 0.

    Raises:
        As `newton_removal`.
    """
    removed = removed_rows(range(influence.n_train) if removals is None else removals, influence.n_train)
    found = torch.zeros(len(removed), influence.n_parameters, dtype=torch.float64)
    for some, steps in _steps(influence, removed, progress):
        found[some] = influence._in_order(steps.step).cpu()
    return found


def inverse_products(influence: Influence, vectors: Float64[Tensor, "m d"]) -> Float64[Tensor, "m d"]:
    """Rows (C + (l2+λ)I)⁻¹ v by the influence's own solver, in the order of `task.parameter_names()`."""
    fit = influence._fitted()
    blocks = {block: rows.T for block, rows in _by_block(influence, vectors.to(fit.rows.device)).items()}
    solved = fit.state.solve(blocks, influence.shifts).values
    return influence._in_order({block: values.T.double() for block, values in solved.items()}).to(vectors.device)


@dataclass(frozen=True, eq=False)
class _Steps:
    """Of some removals: Δθ and u by block, and the leverages."""

    step: Step
    gradient: Step
    leverage: Float64[Tensor, " m"]


class _Outputs:
    """The outputs of the test examples, and how their measurements change where the parameters move."""

    def __init__(self, influence: Influence, batches: Batches) -> None:
        self.influence, self.batches = influence, batches

    def changes(self, step: Step) -> Float64[Tensor, "k m"]:
        """measurement(outputs + J Δθ) − measurement(outputs), in float64."""
        fit, task = self.influence._fitted(), self.influence.task
        vectors = _named(self.influence, step)
        found = []
        for _, batch in fit.capture.running(self.batches):
            with fit.capture.ready():
                moved = output_products(fit.model, task, list(vectors), batch, vectors, VECTORS).double()
                with torch.no_grad():
                    output = task.output(fit.model, batch).double()
                    before = task.measurements(output, batch)
                    after = [task.measurements(output + one, batch) for one in moved]
            found.append(torch.stack([values - before for values in after], dim=1).double())
        return torch.cat(found)


def _steps(
    influence: Influence, removed: Sequence[tuple[int, ...]], progress: bool
) -> Iterator[tuple[list[int], _Steps]]:
    """(which removals, their steps), as many together as a bounded memory holds; those of nothing are left out."""
    rows = RemovedRows(influence)
    fit, n, l2 = influence._fitted(), influence.n_train, influence.task.l2
    if influence.curvature == "hessian" and any(removed):
        rows.check_linear(sorted({row for one in removed for row in one})[:PROBED])
    work = list(_together(removed, rows.q, influence))
    for size, some in track(work, "Newton steps", enabled=progress):
        shifts = {block: shift - l2 * size / n for block, shift in influence.shifts.items()}
        yield some, _newton(fit.state, rows, [removed[i] for i in some], size, shifts)


def _newton(state: Any, rows: RemovedRows, removed: Sequence[tuple[int, ...]], size: int, shifts: Shifts) -> _Steps:
    """The steps of removals of `size` examples each."""
    n, m = rows.n, len(removed)
    features, gradients = rows.of([row for one in removed for row in one])
    steps, used = {}, {}
    leverage = torch.zeros(m, dtype=torch.float64, device=rows.device)
    for block in features:
        F = features[block].reshape(m, size * rows.q, -1)
        u = gradients[block].reshape(m, size, -1).sum(dim=1) + size * rows.decay[block]
        right = torch.cat([F, u[:, None]], dim=1).flatten(0, 1)
        solved = state.solve({block: right.T}, {block: shifts[block]}).values[block].T.double()
        solved = solved.reshape(m, size * rows.q + 1, -1)
        AF, Au = solved[:, :-1], solved[:, -1]
        M = torch.einsum("mqd,mpd->mqp", F, AF) / n
        M = (M + M.mT) / 2
        inner = torch.einsum("mqd,md->mq", F, Au) / n
        weights = torch.cholesky_solve(inner[:, :, None], _factors(M, removed, rows, block))[:, :, 0]
        steps[block] = (Au + torch.einsum("mqd,mq->md", AF, weights)) / n
        used[block] = u
        leverage += M.diagonal(dim1=1, dim2=2).sum(dim=1)
    return _Steps(steps, used, leverage)


def _factors(
    M: Float64[Tensor, "m r r"], removed: Sequence[tuple[int, ...]], rows: RemovedRows, block: str
) -> Float64[Tensor, "m r r"]:
    """Cholesky factors of I − M.

    Raises:
        SolverError: one that is not positive to rounding, with the removal and its example of the largest leverage.
    """
    factors, info = torch.linalg.cholesky_ex(torch.eye(M.shape[1], dtype=M.dtype, device=M.device) - M)
    smallest = factors.diagonal(dim1=1, dim2=2).square().min(dim=1).values
    bad = (info != 0) | ~(smallest > 1 - LARGEST_LEVERAGE)
    if bool(bad.any()):
        which = int(bad.nonzero()[0])
        own = M[which].diagonal().reshape(len(removed[which]), rows.q).sum(dim=1)
        worst = int(own.argmax())
        largest = float(torch.linalg.eigvalsh(M[which])[-1])
        together = f" (removed together with {len(removed[which]) - 1} more)" if len(removed[which]) > 1 else ""
        raise SolverError(
            f"without train example {removed[which][worst]}{together} the damped curvature of block {block!r} is not "
            f"positive: its leverage in one direction is {largest:.6g}, where less than 1 is needed. Use a larger "
            "damping, or an exact solver if this one is approximate"
        )
    return factors


def _together(removed: Sequence[tuple[int, ...]], q: int, influence: Influence) -> Iterator[tuple[int, list[int]]]:
    """(size, which removals): removals of one size, so of one shift, as many as the memory holds."""
    largest = max(influence._fitted().curvature.dimensions.values())
    budget = influence.settings.execution.budget(influence._fitted().rows.device)
    by_size: dict[int, list[int]] = {}
    for i, rows in enumerate(removed):
        by_size.setdefault(len(rows), []).append(i)
    by_size.pop(0, None)
    for size, which in sorted(by_size.items()):
        columns = size * q + 1
        bytes_each = 8 * columns * (COPIES * largest + 2 * columns)
        if bytes_each > budget:
            raise PlanError(
                f"removing {size} examples together takes {columns:,} solves of {largest:,} parameters at once "
                f"({format_bytes(bytes_each)}), and {format_bytes(budget)} are free: remove fewer together"
            )
        step = max(1, COLUMN_BYTES // bytes_each)
        for first in range(0, len(which), step):
            yield size, which[first : first + step]


def _by_block(influence: Influence, rows: Float64[Tensor, "m d"]) -> Step:
    """Rows in the order of the attributed parameters as rows by block."""
    shapes = influence._fitted().capture.shapes
    names = influence.task.parameter_names()
    pieces = dict(zip(names, rows.split([shapes[name].numel() for name in names], dim=1), strict=True))
    return {block: torch.cat([pieces[name] for name in own], dim=1) for block, own in influence.groups.items()}


def _named(influence: Influence, step: Step) -> dict[str, Tensor]:
    """Parameter → (m, *shape)."""
    shapes = influence._fitted().capture.shapes
    named: dict[str, Tensor] = {}
    for block, names in influence.groups.items():
        pieces = step[block].split([shapes[name].numel() for name in names], dim=1)
        named |= {name: piece.reshape(-1, *shapes[name]) for name, piece in zip(names, pieces, strict=True)}
    return named
