"""Refitting one model without each of many sets of examples, all of them together, from an approximate inverse Hessian.

Axis letters: m removals, d parameters, n examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from refluence.batches import Data
from refluence.errors import DataError
from refluence.evaluation.linear_sums import sums_of
from refluence.evaluation.subsets import removed_rows
from refluence.evaluation.sums import Sums, flat_parameters
from refluence.execution import Execution
from refluence.progress import track
from refluence.task import Task

Step = Callable[[Float64[Tensor, "m d"]], Float64[Tensor, "m d"]]
"""Rows g ↦ about H⁻¹g; linear, and the same for every row."""

MOST_TOGETHER = 64
HISTORY = 8
HALVINGS = 30
SUFFICIENT = 1e-4
CURVED = 1e-12
PATIENCE = 10
"""Steps without progress after which a removal is given up: at the end of the digits."""


@dataclass(frozen=True, eq=False)
class Refit:
    """Minimisers without each of m sets of examples, as far as they were reached.

    Attributes:
        parameters: (m, d), in the order of `task.parameter_names()`.
        gradient_norms: ‖∇‖ of each removal's own objective at these parameters.
        iterations: steps taken.
        converged: whether the norm is at most the tolerance.
    """

    parameters: Float64[Tensor, "m d"]
    gradient_norms: Float64[Tensor, " m"]
    iterations: Int64[Tensor, " m"]
    converged: Bool[Tensor, " m"]


def refit_without(
    task: Task,
    train: Data,
    removals: Sequence[Sequence[int]],
    step: Step,
    *,
    start: Float64[Tensor, "..."] | None = None,
    tolerance: float = 1e-8,
    maxiter: int = 100,
    execution: Execution | None = None,
    progress: bool = True,
) -> Refit:
    """For every removal S the minimiser of (1/(n−|S|)) Σ_{j∉S} ℓ_j + (l2/2)‖θ‖², in float64.

    θ ← θ − t·(step(∇), corrected by the secant pairs of the last steps): limited-memory BFGS that starts from `step` in
    place of the identity, so that its first step is the chord-Newton step and a good `step` needs few. t is halved
    until the objective falls; a removal stops where no t makes it fall. All removals are evaluated together, a batch
    of examples at a time.

    Args:
        task: its model's other parameters and buffers stay as they are.
        removals: train rows to leave out, each a sequence; an empty one refits on all data.
        step: an approximate inverse Hessian of the objective, applied to rows, as `newton.inverse_products` of an
            influence is.
        start: parameters to start from, (d,) for all or (m, d); None: the model's.
        tolerance: largest ‖∇‖.
        maxiter: largest number of steps.
        execution: memory that may be used.

    Raises:
        DataError: rows that do not exist, twice in a removal, or all of them; a start of another shape.

    Source: J. Nocedal & S. Wright, Numerical Optimization, algorithm 7.4, with H⁰ = `step`; the acceptance of steps
    whose decrease is below rounding is that of Hager & Zhang 2005.
    """
    sums = sums_of(task, train, execution or Execution())
    first = flat_parameters(task.model, task.parameter_names()) if start is None else start
    parts = list(refits(sums, removals, step, first, task.l2, tolerance, maxiter, execution or Execution(), progress))
    return join([part for _, part in parts], sums.d)


def refits(
    sums: Sums,
    removals: Sequence[Sequence[int]],
    step: Step,
    start: Float64[Tensor, "..."],
    l2: float,
    tolerance: float,
    maxiter: int,
    execution: Execution,
    progress: bool,
) -> Iterator[tuple[list[int], Refit]]:
    """`refit_without` a group at a time: (which removals, their refits)."""
    removals = removed_rows(removals, sums.n)
    m, d = len(removals), sums.d
    if start.shape not in ((d,), (m, d)):
        raise DataError(
            f"start has shape {tuple(start.shape)}; it must be ({d},) or ({m}, {d}): the attributed parameters in the "
            "order of task.parameter_names(), for all removals or for each"
        )
    memory = execution.budget(start.device)
    group = max(1, min(MOST_TOGETHER, sums.together(memory, 2 * HISTORY)))
    for first in track(range(0, m, group), "refitting", enabled=progress):
        some = list(range(first, min(first + group, m)))
        own = start if start.ndim == 1 else start[some]
        yield some, _Search(sums, [removals[i] for i in some], step, own.double(), l2, tolerance).run(maxiter)


def join(parts: Sequence[Refit], d: int) -> Refit:
    """Refits one after the other."""
    if not parts:
        none = torch.zeros(0, dtype=torch.float64)
        return Refit(none.reshape(0, d), none, none.long(), none.bool())
    return Refit(
        torch.cat([part.parameters for part in parts]),
        torch.cat([part.gradient_norms for part in parts]),
        torch.cat([part.iterations for part in parts]),
        torch.cat([part.converged for part in parts]),
    )


@dataclass(eq=False)
class _Pair:
    """A secant pair of every removal: s, y, step(y), and 1/⟨s, y⟩, which is 0 where the pair is left out."""

    s: Float64[Tensor, "m d"]
    y: Float64[Tensor, "m d"]
    stepped: Float64[Tensor, "m d"]
    inverse: Float64[Tensor, " m"]

    def keep(self, rows: Bool[Tensor, " m"]) -> _Pair:
        """Of some removals."""
        return _Pair(self.s[rows], self.y[rows], self.stepped[rows], self.inverse[rows])


@dataclass(eq=False)
class _State:
    """The removals still sought."""

    which: Int64[Tensor, " m"]
    theta: Float64[Tensor, "m d"]
    value: Float64[Tensor, " m"]
    gradient: Float64[Tensor, "m d"]
    stepped: Float64[Tensor, "m d"]
    flattest: Float64[Tensor, " m"]
    idle: Int64[Tensor, " m"]
    pairs: list[_Pair] = field(default_factory=list)

    def keep(self, rows: Bool[Tensor, " m"]) -> None:
        """Only some of them."""
        if bool(rows.all()):
            return
        self.which, self.theta = self.which[rows], self.theta[rows]
        self.value, self.gradient, self.stepped = self.value[rows], self.gradient[rows], self.stepped[rows]
        self.flattest, self.idle = self.flattest[rows], self.idle[rows]
        self.pairs = [pair.keep(rows) for pair in self.pairs]


class _Search:
    """The minimisation of a group of removals."""

    def __init__(
        self,
        sums: Sums,
        removals: Sequence[tuple[int, ...]],
        step: Step,
        start: Float64[Tensor, "..."],
        l2: float,
        tolerance: float,
    ) -> None:
        self.sums, self.removals, self.step, self.l2, self.tolerance = sums, removals, step, l2, tolerance
        self.counts = torch.tensor([sums.n - len(rows) for rows in removals], dtype=torch.float64, device=start.device)
        m = len(removals)
        theta = start.expand(m, -1).contiguous().clone() if start.ndim == 1 else start.clone()
        everywhere = torch.arange(m, device=start.device)
        value, gradient = self._objective(theta, everywhere, same=start.ndim == 1)
        norms, zeros = gradient.norm(dim=1), torch.zeros_like(everywhere)
        self.state = _State(everywhere, theta, value, gradient, gradient, norms, zeros)
        self.found = Refit(theta.clone(), norms.clone(), zeros.clone(), zeros.bool())

    def run(self, maxiter: int) -> Refit:
        """Steps until every removal has converged, stalled, or taken `maxiter`."""
        state, found = self.state, self.found
        state.keep(found.gradient_norms > self.tolerance)
        for _ in range(maxiter):
            if not len(state.which):
                break
            moved = self._advance(state)
            norms = state.gradient.norm(dim=1)
            found.parameters[state.which] = state.theta
            found.gradient_norms[state.which] = norms
            found.iterations[state.which] += moved.long()
            stalled = ~moved
            for pair in state.pairs:
                stalled &= pair.inverse == 0
                pair.inverse[~moved] = 0
            state.keep(~stalled & (state.idle < PATIENCE) & (norms > self.tolerance))
        converged = found.gradient_norms <= self.tolerance
        return Refit(found.parameters, found.gradient_norms, found.iterations, converged)

    def _advance(self, state: _State) -> Bool[Tensor, " m"]:
        """One step for each removal that has one; whether it has."""
        self._measure(state)
        direction = self._direction(state)
        slope = (state.gradient * direction).sum(dim=1)
        uphill = ~(slope < 0)
        if bool(uphill.any()):
            steepest = state.gradient[uphill]
            lengths = direction[uphill].norm(dim=1) / steepest.norm(dim=1)
            direction[uphill] = -steepest * torch.where(torch.isfinite(lengths), lengths, 1.0)[:, None]
            slope[uphill] = (steepest * direction[uphill]).sum(dim=1)
        norms = state.gradient.norm(dim=1)
        theta, value, gradient = state.theta.clone(), state.value.clone(), state.gradient.clone()
        pending, length = torch.arange(len(slope), device=slope.device), 1.0
        for _ in range(HALVINGS):
            tried = state.theta[pending] + length * direction[pending]
            new_value, new_gradient = self._objective(tried, state.which[pending])
            falls = new_value <= state.value[pending] + SUFFICIENT * length * slope[pending]
            level = new_value <= state.value[pending] + self.sums.rounding * state.value[pending].abs()
            flatter = new_gradient.norm(dim=1) < norms[pending]
            accepted = (falls & (flatter | (new_value < state.value[pending]))) | (level & flatter)
            accepted &= torch.isfinite(new_gradient).all(dim=1)
            rows = pending[accepted]
            theta[rows], value[rows], gradient[rows] = tried[accepted], new_value[accepted], new_gradient[accepted]
            pending, length = pending[~accepted], length / 2
            if not len(pending):
                break
        moved = torch.ones(len(slope), dtype=torch.bool, device=slope.device)
        moved[pending] = False
        s, y = theta - state.theta, gradient - state.gradient
        product = (s * y).sum(dim=1)
        curved = product > CURVED * s.norm(dim=1) * y.norm(dim=1)
        # The step of y becomes known with the next gradient's; until then it is less that of this one.
        state.pairs.append(_Pair(s, y, -state.stepped, torch.where(curved, 1 / product, 0.0)))
        if len(state.pairs) > HISTORY:
            del state.pairs[0]
        norms = gradient.norm(dim=1)
        progress = (value < state.value - self.sums.rounding * state.value.abs()) | (norms < state.flattest / 2)
        state.idle = torch.where(progress, 0, state.idle + 1)
        state.flattest = torch.where(progress, torch.minimum(norms, state.flattest), state.flattest)
        state.theta, state.value, state.gradient = theta, value, gradient
        return moved

    def _measure(self, state: _State) -> None:
        """The step of the gradient, and so, as it is linear, of the last pair's y."""
        state.stepped = self.step(state.gradient)
        if state.pairs:
            state.pairs[-1].stepped += state.stepped

    def _direction(self, state: _State) -> Float64[Tensor, "m d"]:
        """−H∇ by the two-loop recursion around `step` times γ = ⟨s, y⟩/⟨y, step(y)⟩ of the last pair."""
        q, stepped = state.gradient.clone(), state.stepped.clone()
        shares = []
        for pair in reversed(state.pairs):
            share = pair.inverse * (pair.s * q).sum(dim=1)
            q -= share[:, None] * pair.y
            stepped -= share[:, None] * pair.stepped
            shares.append(share)
        r = stepped * _scale(state.pairs, q)[:, None]
        for pair, share in zip(state.pairs, reversed(shares), strict=True):
            r += (share - pair.inverse * (pair.y * r).sum(dim=1))[:, None] * pair.s
        return -r

    def _objective(
        self, thetas: Float64[Tensor, "m d"], which: Int64[Tensor, " m"], same: bool = False
    ) -> tuple[Float64[Tensor, " m"], Float64[Tensor, "m d"]]:
        """Values and gradients of the objectives of some removals; `same` where all θ are equal."""
        removed = [self.removals[i] for i in which.tolist()]
        value, gradient = self.sums.of_all(thetas[:1] if same else thetas)
        less, less_gradient = self.sums.of_sets(thetas, removed)
        counts = self.counts[which]
        value = (value - less) / counts + self.l2 / 2 * thetas.square().sum(dim=1)
        return value, (gradient - less_gradient) / counts[:, None] + self.l2 * thetas


def _scale(pairs: Sequence[_Pair], like: Float64[Tensor, "m d"]) -> Float64[Tensor, " m"]:
    """γ of the last pair that each removal has, 1 where it has none."""
    scale = like.new_ones(len(like))
    for pair in pairs:
        found = 1 / (pair.inverse * (pair.y * pair.stepped).sum(dim=1))
        scale = torch.where(torch.isfinite(found) & (found > 0) & (pair.inverse > 0), found, scale)
    return scale
