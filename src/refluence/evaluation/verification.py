"""Live checks of a prediction: some examples are really removed, the model refitted, and the change measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.batches import Data
from refluence.errors import DataError, RefluenceError
from refluence.evaluation.held_sums import HeldSums
from refluence.evaluation.linear_sums import sums_of
from refluence.evaluation.measuring import measure
from refluence.evaluation.newton import inverse_products, newton_removal
from refluence.evaluation.refitting import Refit, join, refits
from refluence.evaluation.sums import flat_parameters
from refluence.evaluation.verdict import METRICS, Verdict, agreement_of, finite_or_none, sentence_of, verdict_of
from refluence.gradients.functional import single_gradients
from refluence.influence import Influence
from refluence.scores import Scores

TOLERANCE = 1e-3
"""Gradient norm that a refit is to reach, as a share of what removing the example adds to the gradient."""
CONVERGED = 0.05
"""The same share up to which a refit counts as converged."""
SMALLEST = 1e-3
"""Shares below this one of the largest do not tighten the tolerance."""
MAXITER = 100
WORK = 5e11
"""Multiply-adds that the refits may take."""
INNER_STEPS = 60
"""Products with the curvature that an iterative solver takes for a step."""


@dataclass(frozen=True, eq=False)
class Verification:
    """What removing examples did, beside what was predicted.

    Attributes:
        frame: one row for each removed example and test: `removed` (train row), `chosen` ("largest" or "random"),
            `test`, `predicted` (influence, with the example's share of the l2 term), `newton` (Newton-corrected, NaN
            where the curvature has none), `measured`, `gradient_norm` (of the refit and of the one with nothing
            removed, the larger, relative to what removing the example adds to the gradient), `iterations`, `converged`.
        slope: of the least-squares line predicted ≈ slope·measured + intercept; below 1 predictions are too small.
        spearman, pearson: correlations of predicted and measured.
        r2: 1 − Σ(measured − predicted)²/Σ(measured − mean)²: the share explained by predicted = measured.
            All four over the rows that converged, or over all where the verdict is "not converged".
        verdict: "not converged" where fewer than half of the removed examples converged; else "agrees" where the slope
            is 0.7 to 1.4, Spearman ≥ 0.9, R² ≥ 0.8 and the refits were of the training objective; "disagrees" where
            Spearman < 0.5 or the slope is not positive; else "partly".
        sentence: all this in plain language.
        details: how it was done, and `newton`, the statistics of the Newton-corrected prediction; JSON-able.
    """

    frame: pd.DataFrame
    slope: float
    spearman: float
    pearson: float
    r2: float
    verdict: Verdict
    sentence: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def manifest(self) -> dict[str, Any]:
        """The statistics, the verdict and how it was done: JSON-able."""
        numbers = {name: finite_or_none(getattr(self, name)) for name in METRICS}
        removed = [int(row) for row in dict.fromkeys(self.frame["removed"])]
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            **numbers,
            "removed": removed,
            "tests": int(self.frame["test"].nunique()),
            **self.details,
        }


def verify(
    influence: Influence,
    scores: Scores,
    test: Data,
    count: int = 8,
    *,
    seed: int = 0,
    objective: str = "auto",
    maxiter: int | None = None,
    progress: bool = True,
) -> Verification:
    """Remove examples one by one, refit the model from where it is, and compare with the prediction.

    Half of the examples are those with the largest |score| on any test, half are drawn at random from the others. Each
    refit minimises the objective without its example, in eval mode (no dropout) and float64, with the influence's own
    solver for steps; measured is the measurement of the refit minus that of a refit from the same parameters with
    nothing removed, which takes away what more training alone would change. Predicted is

        score/n + l2·(A⁻¹g_test)ᵀθ/n,  A = C + (l2+λ)I,

    the influence of the example with its share of the l2 term.

    Without l2 a classifier's objective has mostly no minimum to refit to: the parameters run away whatever is removed.
    Then the objective is held to the model by the Bregman divergence of the outputs and (λ/2)‖θ − θ̂‖² (`HeldSums`),
    and the example's loss is taken off: the proximal Bregman response (Bae et al. 2022, arXiv 2209.05364). That checks
    the local approximation, not what another training gives, so the verdict is "partly" at best.

    Args:
        influence: fitted, and the one that gave the scores.
        scores: of `test`, one row for each of its examples, one column for each train example.
        test: the test examples.
        count: how many examples are removed.
        seed: of the random ones.
        objective: "training", "held", or "auto": "training" with l2, "held" without.
        maxiter: the most steps of a refit; None: 100, or as many as some minutes of work hold.
        progress: whether a long computation shows a bar.

    Raises:
        DataError: scores of other data or in other units, weights in the fit, a count that is not 2 to n − 1.
    """
    n = influence.n_train
    _check(influence, scores, count, objective)
    chosen = choose(scores, count, seed)
    removed = list(chosen)
    tests = influence._test_rows(test)
    if tests.n != scores.shape[0]:
        raise DataError(
            f"the scores have {scores.shape[0]} tests and `test` has {tests.n}: give the tests of the scores"
        )
    task, batches = influence.task, influence._fitted().rows.batches
    theta = flat_parameters(task.model, task.parameter_names()).double().cpu()
    predicted = scores.values[:, removed].double().cpu() / n
    if task.l2:
        predicted = predicted + task.l2 / n * (influence.inverse_hvp(test) @ theta)[:, None]
    corrected, why = _corrected(influence, test, removed, progress)
    train = batches.select(range(n))
    held = objective == "held" or (objective == "auto" and task.l2 == 0)
    execution = influence.settings.execution
    sums = _held(influence, train) if held else sums_of(task, train, execution)
    shares = _shares(influence, removed, theta)
    limit = _steps_within(influence, len(removed) + 1) if maxiter is None else maxiter
    tolerance = TOLERANCE * float(shares.clamp(min=SMALLEST * float(shares.max())).min())
    removals = [[], *([row] for row in removed)]
    step = partial(inverse_products, influence)
    parts = refits(sums, removals, step, theta, task.l2, tolerance, limit, execution, progress)
    refit = join([part for _, part in parts], sums.d)
    values = _measured(influence, refit, test)
    measured = (values[1:] - values[0]).T
    norms = refit.gradient_norms.cpu()
    relative = torch.maximum(norms[1:], norms[0]) / shares
    frame = _frame(scores, chosen, predicted, corrected, measured, relative, refit.iterations[1:].cpu())
    details = {
        "objective": "held" if held else "training",
        "count": count,
        "seed": seed,
        "maxiter": limit,
        "tolerance": tolerance,
        "baseline_gradient_norm": float(norms[0]),
        "baseline_iterations": int(refit.iterations[0]),
        "newton_missing": why,
    }
    return conclude(frame, details)


def choose(scores: Scores, count: int, seed: int) -> dict[int, str]:
    """Train row → "largest" or "random": half of them the largest |score| on any test, half drawn from the others."""
    strength = scores.values.double().abs().max(dim=0).values.cpu()
    largest = torch.sort(strength, descending=True, stable=True).indices[: -(-count // 2)].tolist()
    others = np.setdiff1d(np.arange(len(strength)), largest)
    drawn = np.random.default_rng(seed).choice(others, count // 2, replace=False)
    return dict.fromkeys(largest, "largest") | dict.fromkeys(map(int, drawn), "random")


def conclude(frame: pd.DataFrame, details: Mapping[str, Any]) -> Verification:
    """The statistics, verdict and sentence of measured and predicted changes."""
    examples = frame.groupby("removed", sort=False)["converged"].all()
    enough = 2 * int(examples.sum()) >= len(examples)
    rows = frame[frame["converged"]] if enough else frame
    statistics = agreement_of(rows, "predicted")
    newton = None if frame["newton"].isna().any() else agreement_of(rows, "newton")
    verdict = verdict_of(statistics) if enough else "not converged"
    if verdict == "agrees" and details.get("objective") == "held":
        verdict = "partly"
    done = {**details, "converged": int(examples.sum()), "newton": newton}
    sentence = sentence_of(verdict, statistics, newton, examples, frame, done)
    numbers = {name: math.nan if value is None else value for name, value in statistics.items()}
    return Verification(frame, **numbers, verdict=verdict, sentence=sentence, details=done)


def _check(influence: Influence, scores: Scores, count: int, objective: str) -> None:
    n = influence.n_train
    if objective not in ("auto", "training", "held"):
        raise DataError(f'objective must be "auto", "training" or "held", not {objective!r}')
    if not isinstance(count, int) or isinstance(count, bool) or not 2 <= count < n:
        raise DataError(f"count must be an integer from 2 to {n - 1}, not {count!r}")
    changed = [name for name in ("normalize", "score_weights", "groups") if scores.manifest.get(name) is not None]
    if changed or scores.shape[1] != n or scores.n_train != n:
        raise DataError(
            f"the scores are no plain scores of the {n} train examples"
            f"{f' ({changed[0]}={scores.manifest[changed[0]]!r})' if changed else f' (shape {scores.shape})'}: verify "
            "influence.score(test) without weights, groups or normalize"
        )
    if influence.skipped:
        raise DataError(
            f"the fit left out {len(influence.skipped):,} bad examples, and the refits leave out none: take them out "
            "of the data to verify"
        )
    if influence._fitted().curvature.weights is not None:
        raise DataError("the fit has weights, and the refits have none: fit without weights to verify")


def _corrected(
    influence: Influence, test: Data, removed: Sequence[int], progress: bool
) -> tuple[Float64[Tensor, "k m"] | None, str | None]:
    """The Newton-corrected changes, or why there are none."""
    try:
        return newton_removal(influence, test, removed, progress=progress).changes, None
    except RefluenceError as error:
        return None, str(error)


def _shares(influence: Influence, removed: Sequence[int], theta: Float64[Tensor, " d"]) -> Float64[Tensor, " m"]:
    """‖∇ℓ_i + l2 θ‖/n: what removing each example adds to the gradient of the objective."""
    fit = influence._fitted()
    batch = fit.rows.batches.select(removed)
    with fit.capture.ready():
        gradients = single_gradients(fit.model, fit.capture.loss, influence.task.parameter_names(), batch)
    rows = torch.cat([gradients[name].double() for name in influence.task.parameter_names()], dim=1).cpu()
    return (rows + influence.task.l2 * theta).norm(dim=1) / influence.n_train


def _steps_within(influence: Influence, models: int) -> int:
    """Steps of so many models that the allowed work holds."""
    plan = influence.plan
    inner = INNER_STEPS if getattr(plan.chosen.solver, "iterative", False) else 1
    return int(min(MAXITER, max(5, WORK / (models * plan.workload.product_work * inner))))


def _held(influence: Influence, train: Data) -> HeldSums:
    task = influence.task
    dampings = {name: shift - task.l2 for block, shift in influence.shifts.items() for name in influence.groups[block]}
    return HeldSums(task, train, dampings)


def _measured(influence: Influence, refit: Refit, test: Data) -> Float64[Tensor, "m k"]:
    """The measurements of the refitted models."""
    task = influence.task
    own = dict(task.model.named_parameters())
    names = task.parameter_names()
    pieces = refit.parameters.split([own[name].numel() for name in names], dim=1)
    states = {name: piece.reshape(-1, *own[name].shape) for name, piece in zip(names, pieces, strict=True)}
    found = measure(task, states, test)
    return found["measurement" if "measurement" in found else "loss"]


def _frame(
    scores: Scores,
    chosen: Mapping[int, str],
    predicted: Float64[Tensor, "k m"],
    corrected: Float64[Tensor, "k m"] | None,
    measured: Float64[Tensor, "k m"],
    relative: Float64[Tensor, " m"],
    iterations: Tensor,
) -> pd.DataFrame:
    k, m = predicted.shape
    newton = torch.full_like(predicted, math.nan) if corrected is None else corrected
    return pd.DataFrame(
        {
            "removed": np.repeat(list(chosen), k),
            "chosen": np.repeat(list(chosen.values()), k),
            "test": np.tile(scores.test_ids, m),
            "predicted": predicted.T.reshape(-1).numpy(),
            "newton": newton.T.reshape(-1).numpy(),
            "measured": measured.T.reshape(-1).numpy(),
            "gradient_norm": np.repeat(relative.numpy(), k),
            "iterations": np.repeat(iterations.numpy(), k),
            "converged": np.repeat((relative <= CONVERGED).numpy(), k),
        }
    )
