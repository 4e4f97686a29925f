"""What each method predicts for the removal of every train example."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.influence import Influence
from refluence.solvers import ConjugateGradient, Dense, Lissa, Solver
from refluence.studies.leave_one_out.settings import TRUNCATED, TRUNCATED_MEAN, Problem, Setting
from refluence.task import Task

TITLES = {
    "exact": "Exact Hessian",
    "cg": "Conjugate gradients",
    "ggn": "Gauss–Newton matrix",
    "lissa": "LiSSA, automatic scale and depth",
    "lissa_paper": "LiSSA, the paper's parameters",
    "newton": "Newton-corrected",
    TRUNCATED: "LiSSA, 3,000 steps at scale 10",
    TRUNCATED_MEAN: "3,000 steps at scale 10, no noise",
}
REPEATS, AUTOMATIC_REPEATS = 10, 4
PAPER_SEED = "lissa_paper_seed"
TRUNCATED_DEPTH, TRUNCATED_SCALE = 3_000, 10.0


@dataclass(frozen=True)
class Method:
    """A solver, and whether it runs in float32, where its own error is far above rounding."""

    key: str
    solver: Solver
    single: bool = False


def paper_seed(seed: int) -> str:
    """The key of LiSSA with the paper's parameters and one seed."""
    return f"{PAPER_SEED}{seed}"


def methods(setting: Setting, seed: int) -> list[Method]:
    """Every method but Newton's correction, which goes with the first; `seed` is that of the first LiSSA."""
    found = [
        Method("exact", Dense()),
        Method("cg", ConjugateGradient()),
        Method("lissa", _automatic(setting, seed), single=True),
        *(
            Method(
                paper_seed(s), Lissa(depth=5_000, scale=25.0, repeats=REPEATS, batch_size=1, seed=seed + s), single=True
            )
            for s in range(setting.seeds)
        ),
    ]
    depth, scale = TRUNCATED_DEPTH, TRUNCATED_SCALE
    truncated = (
        Method(TRUNCATED, Lissa(depth=depth, scale=scale, repeats=REPEATS, batch_size=512, seed=seed), single=True),
        Method(TRUNCATED_MEAN, Lissa(depth=depth, scale=scale), single=True),
    )
    found += [method for method in truncated if method.key in setting.truncated]
    return found


def _automatic(setting: Setting, seed: int) -> Lissa:
    """Scale and depth measured."""
    return Lissa() if setting.batch is None else Lissa(batch_size=setting.batch, repeats=AUTOMATIC_REPEATS, seed=seed)


def fitted(task: Task, problem: Problem, method: Method, progress: bool) -> Influence:
    """The method on the train data, with no damping beside l2.

    The Gauss–Newton matrix of a softmax regression is its Hessian.
    """
    return Influence(
        task,
        curvature="ggn",
        solver=method.solver,
        damping=0.0,
        dtype=torch.float32 if method.single else None,
        progress=progress,
    ).fit(problem.train)


def predicted_changes(influence: Influence, test: tuple[Tensor, Tensor]) -> Float64[Tensor, " n"]:
    """s_testᵀ(∇ℓ_i + l2·θ)/n for every train example i, with s_test = H⁻¹∇ℓ_test.

    At the minimum l2·θ = −mean ∇ℓ, so the l2 share of an example is minus the mean of the scores.
    """
    scores = influence.score(test).values[0].double()
    return (scores - scores.mean()) / influence.n_train
