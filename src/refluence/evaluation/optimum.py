"""The minimum of a convex objective in float64, with an inverse of its Hessian there.

Axis letters: m vectors, d parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from numpy.typing import NDArray
from scipy.optimize import minimize as scipy_minimize
from torch import Tensor, nn

from refluence.batches import Data
from refluence.damping import RelativeDamping
from refluence.errors import SolverError
from refluence.evaluation.linear_sums import LinearSums
from refluence.evaluation.newton import inverse_products
from refluence.evaluation.refitting import Step, refits
from refluence.evaluation.sums import Sums, float64_copy
from refluence.execution import Execution
from refluence.influence import Influence
from refluence.linalg.lanczos import ends_steps
from refluence.linalg.lockstep import run
from refluence.progress import track
from refluence.solvers import ConjugateGradient, Dense, Identity
from refluence.task import Task

MOST_DENSE = 12_000
"""Parameters up to which the Hessian is factorised."""
MOST_DENSE_PRODUCTS = 2_048
"""The same where it is made by one product for each parameter and decomposed for its sign."""
ROUNDS = 8
STEPS_A_ROUND = 12
MOST_GRADIENT_STEPS = 2_000
LANCZOS_STEPS = 40
NEGATIVE = 1e-6
"""Below −NEGATIVE of the largest eigenvalue an eigenvalue is no rounding."""
REGULARISED = 1e-8
INEXACT = 1e-4
MOVES_ON = 1e-3


@dataclass(frozen=True, eq=False)
class Optimum:
    """Where the gradient vanishes.

    Attributes:
        parameters: in the order of `task.parameter_names()`.
        gradient_norm: ‖∇‖ there.
        iterations: Newton steps taken.
        step: rows ↦ about H⁻¹ rows.
    """

    parameters: Float64[Tensor, " d"]
    gradient_norm: float
    iterations: int
    step: Step


def optimum(
    task: Task, train: Data, sums: Sums, start: Tensor, tolerance: float, execution: Execution, progress: bool
) -> Optimum:
    """The minimum, from `start`: L-BFGS to a gradient of √tolerance/10, then Newton's steps with a factorised Hessian.

    Raises:
        SolverError: negative curvature, no minimum, or a gradient that does not fall to the tolerance.
    """
    linear = isinstance(sums, LinearSums)
    if not linear or callable(task.loss):
        _refuse_negative_curvature(task, train, start, progress)
    theta, iterations = _by_gradients(sums, start.double(), task.l2, tolerance**0.5 / 10, progress), 0
    norm = float("inf")
    for _ in range(ROUNDS):
        step = hessian_inverse(task, train, theta, linear, progress)
        [(_, found)] = list(refits(sums, [()], step, theta, task.l2, tolerance, STEPS_A_ROUND, execution, False))
        theta, norm = found.parameters[0], float(found.gradient_norms[0])
        iterations += int(found.iterations[0])
        if bool(found.converged[0]):
            if task.l2 == 0:
                _refuse_no_minimum(task, train, sums, theta, linear, progress)
            return Optimum(theta, norm, iterations, step)
    raise SolverError(
        f"the gradient of the objective stays at {norm:.3g}, above the tolerance {tolerance:.3g}, after {iterations} "
        "Newton steps: use a larger l2 or tolerance; an objective that is not convex has no single minimum to be "
        "refitted, see rf.evaluation.retrain"
    )


def hessian_inverse(task: Task, train: Data, theta: Float64[Tensor, " d"], linear: bool, progress: bool) -> Step:
    """Rows ↦ H⁻¹ rows at θ: by a factorisation of H, or by conjugate gradients where it is large.

    For outputs linear in θ the Gauss–Newton matrix is the Hessian.

    Raises:
        SolverError: negative curvature.
    """
    at = task_at(task, theta)
    dense = len(theta) <= (MOST_DENSE if linear else MOST_DENSE_PRODUCTS)
    influence = Influence(
        at,
        curvature="ggn" if linear else "hessian",
        solver=Dense() if dense else ConjugateGradient(rtol=INEXACT),
        # Where l2 = 0 directions that no output depends on have no curvature.
        damping=0.0 if task.l2 > 0 else RelativeDamping(REGULARISED),
        dtype=torch.float64,
        progress=progress,
    )
    with _negative_curvature_named(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the damped ")
        influence.fit(train)
        inverse_products(influence, torch.zeros(1, len(theta), dtype=torch.float64))
    if any(influence.diagnostics.get("negative_shifted", {}).values()):
        raise _not_convex("has a negative eigenvalue at its stationary point")
    return lambda rows: inverse_products(influence, rows)


def task_at(task: Task, theta: Float64[Tensor, " d"]) -> Task:
    """The task on a float64 copy of its model with these attributed parameters."""
    return Task(model_at(task, theta), task.loss, task.forward, task.measurement, task.parameter_names(), task.l2)


def model_at(task: Task, theta: Float64[Tensor, " d"]) -> nn.Module:
    """A float64 copy of a task's model with these attributed parameters."""
    model = float64_copy(task.model)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in split_parameters(task, theta[None]).items():
            own[name].copy_(values[0])
    return model


def split_parameters(task: Task, thetas: Float64[Tensor, "m d"]) -> dict[str, Tensor]:
    """Name → (m, *shape)."""
    own = dict(task.model.named_parameters())
    names = task.parameter_names()
    pieces = thetas.split([own[name].numel() for name in names], dim=1)
    return {name: piece.reshape(-1, *own[name].shape) for name, piece in zip(names, pieces, strict=True)}


def _by_gradients(
    sums: Sums, start: Float64[Tensor, " d"], l2: float, tolerance: float, progress: bool
) -> Float64[Tensor, " d"]:
    """L-BFGS until no entry of the gradient is above `tolerance`."""
    bar = iter(track(range(MOST_GRADIENT_STEPS), "minimising", enabled=progress))

    def objective(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        theta = torch.as_tensor(values, dtype=torch.float64, device=start.device)[None]
        value, gradient = sums.of_all(theta)
        slope = gradient[0] / sums.n + l2 * theta[0]
        return float(value[0]) / sums.n + l2 / 2 * float(theta.square().sum()), slope.cpu().numpy()

    options = {"gtol": tolerance, "ftol": 0.0, "maxiter": MOST_GRADIENT_STEPS, "maxfun": 2 * MOST_GRADIENT_STEPS}
    try:
        found = scipy_minimize(
            objective,
            start.cpu().numpy(),
            jac=True,
            method="L-BFGS-B",
            options=options,
            callback=lambda _: next(bar, None),
        )
    finally:
        bar.close()  # type: ignore[attr-defined]
    return torch.as_tensor(found.x, dtype=torch.float64, device=start.device)


def _refuse_negative_curvature(task: Task, train: Data, theta: Float64[Tensor, " d"], progress: bool) -> None:
    """An error where the Hessian at the start has a negative eigenvalue, found by Lanczos."""
    influence = Influence(task_at(task, theta), "hessian", Identity(), 1.0, dtype=torch.float64, progress=progress)
    curvature = influence.fit(train)._fitted().curvature
    [block] = curvature.groups
    d = curvature.dimensions[block]
    ends = run(ends_steps(d, 0, min(d, LANCZOS_STEPS), torch.float64, curvature.device), curvature.operator(block))
    if ends.low + task.l2 < -NEGATIVE * max(abs(ends.low), abs(ends.high)):
        raise _not_convex(f"has the curvature {ends.low + task.l2:.3g} in some direction at the start")


def _refuse_no_minimum(
    task: Task, train: Data, sums: Sums, theta: Float64[Tensor, " d"], linear: bool, progress: bool
) -> None:
    """An error where a Newton step from a point with nearly no gradient is still a long one."""
    gradient = sums.of_all(theta[None])[1] / sums.n
    length = float(hessian_inverse(task, train, theta, linear, progress)(gradient).norm())
    if length > MOVES_ON * max(1.0, float(theta.norm())):
        raise SolverError(
            f"the objective has no minimum: with l2 = 0 it falls for ever as the parameters grow (norm "
            f"{float(theta.norm()):.3g}, next Newton step {length:.3g}), as for classes that can be separated: give "
            "the task an l2 > 0"
        )


@contextmanager
def _negative_curvature_named() -> Iterator[None]:
    try:
        yield
    except SolverError as error:
        raise _not_convex(f"has negative curvature ({error})") from error


def _not_convex(what: str) -> SolverError:
    return SolverError(
        f"the training objective is not convex: it {what}. Leaving examples out of such a model means training it "
        "again, see rf.evaluation.retrain"
    )
