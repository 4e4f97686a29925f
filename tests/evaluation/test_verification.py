"""Live checks: what is measured is what really removing the examples does."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import refluence as rf
from refluence.errors import DataError
from refluence.evaluation.verification import choose, conclude, verify
from refluence.solvers import ConjugateGradient, Dense, Ekfac, Gram
from support.curvatures import LeastSquares
from support.problems import close

L2 = 0.05
DATA, TESTS = LeastSquares(), LeastSquares(n=5, seed=1)
N = len(DATA.x)


def minimum(keep, l2=L2):
    """The minimiser of the mean loss of some rows + (l2/2)‖θ‖²."""
    x, y = torch.cat([DATA.x, torch.ones(N, 1).double()], 1)[keep], DATA.y[keep]
    moment = 2 / DATA.o * x.T @ x / len(keep) + l2 * torch.eye(21).double()
    theta = torch.linalg.solve(moment, 2 / DATA.o * x.T @ y / len(keep))
    found = LeastSquares()
    found.W, found.b = theta[:-1].T.contiguous(), theta[-1]
    return found


def losses(of):
    return (TESTS.x @ of.W.T + of.b - TESTS.y).square().mean(dim=1)


def fitted(model=None, solver=None, curvature="ggn", l2=L2, damping=1e-9, **options):
    model = minimum(list(range(N))).model() if model is None else model
    task = rf.Task(model, loss="mse", l2=l2, **options)
    return rf.Influence(task, curvature, solver or Dense(), damping, progress=False).fit((DATA.x, DATA.y))


def verified(influence, count=6, **options):
    test = (TESTS.x, TESTS.y)
    return verify(influence, influence.score(test), test, count, progress=False, **options)


def pivot(result, column):
    table = result.frame.pivot(index="test", columns="removed", values=column)
    return torch.from_numpy(table[list(dict.fromkeys(result.frame["removed"]))].to_numpy(copy=True))


@pytest.mark.parametrize("start", ["minimum", "elsewhere"])
@pytest.mark.parametrize("solver", [Dense(), ConjugateGradient(rtol=1e-10), Ekfac()])
def test_measured_is_the_change_that_refitting_makes(solver, start):
    """Also where the model is at no minimum: the refit with nothing removed is subtracted."""
    model = None if start == "minimum" else LeastSquares().model()
    result = verified(fitted(model, solver))
    whole = losses(minimum(list(range(N))))
    removed = list(dict.fromkeys(result.frame["removed"]))
    expected = [losses(minimum([j for j in range(N) if j != i])) - whole for i in removed]
    close(pivot(result, "measured"), torch.stack(expected, dim=1), 1e-3)
    assert result.frame["converged"].all()
    assert float(result.frame["gradient_norm"].max()) <= 0.05


def test_the_predictions_are_the_scores_with_the_l2_share_and_newton_is_exact():
    influence = fitted()
    result = verified(influence)
    removed = list(dict.fromkeys(result.frame["removed"]))
    at = minimum(list(range(N)))
    V, G = at.gradients(TESTS.x, TESTS.y), at.gradients(DATA.x, DATA.y)
    theta = torch.cat([at.W.flatten(), at.b])
    H = torch.linalg.inv(DATA.hessian(DATA.x) + (L2 + 1e-9) * torch.eye(84).double())
    close(pivot(result, "predicted"), V @ H @ (G[removed] + L2 * theta).T / N, 1e-9)
    close(pivot(result, "newton"), pivot(result, "measured"), 1e-3)
    assert result.details["newton"]["r2"] > 0.9999
    assert 0.3 < result.slope < 1, "influence is too small where leverages are large"


def test_the_model_and_the_random_state_stay_as_they_were():
    influence = fitted(nn.Sequential(nn.Linear(20, 8), nn.Dropout(0.5), nn.Linear(8, 4)).double().train())
    before = {name: value.clone() for name, value in influence.task.model.state_dict().items()}
    state = torch.random.get_rng_state()
    first, second = (verified(influence, count=2, maxiter=5) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert influence.task.model.training
    assert all(torch.equal(value, before[name]) for name, value in influence.task.model.state_dict().items())
    assert all(parameter.grad is None for parameter in influence.task.model.parameters())
    pd.testing.assert_frame_equal(first.frame, second.frame)


def test_the_choice_is_seeded_and_half_of_it_the_largest():
    values = torch.zeros(3, 20)
    values[1, 7], values[2, 3], values[0, 11] = -9.0, 5.0, 4.0
    scores = rf.Scores(values, 20)
    chosen = choose(scores, 5, 0)
    assert list(chosen.items())[:3] == [(7, "largest"), (3, "largest"), (11, "largest")]
    assert list(chosen.values())[3:] == ["random"] * 2
    assert len(chosen) == 5
    assert choose(scores, 5, 0) == chosen
    assert any(choose(scores, 5, seed) != chosen for seed in range(1, 4))


def test_a_limit_of_steps_is_said():
    """One step of a poor solver from a model that is at no minimum."""
    result = verified(fitted(LeastSquares().model(), Gram(), "fisher", damping=10.0), maxiter=1)
    assert result.verdict == "not converged"
    assert "0 of 6 refits settled within 1 steps" in result.sentence
    assert not result.frame["converged"].any()


def test_without_l2_the_objective_is_held_to_the_model():
    """The proximal Bregman response, (H + λ − H_i/n)⁻¹ g_i/n for least squares, wherever the model is."""
    at, damping = LeastSquares(), 0.3
    result = verified(fitted(at.model(), l2=0.0, damping=damping))
    assert result.details["objective"] == "held"
    assert result.details["baseline_iterations"] == 0
    assert result.verdict in ("partly", "disagrees")
    assert "checks the local approximation" in result.sentence
    removed = list(dict.fromkeys(result.frame["removed"]))
    G, changes = at.gradients(DATA.x, DATA.y), []
    theta = torch.cat([at.W.flatten(), at.b])
    H = at.hessian(DATA.x) + damping * torch.eye(84).double()
    for i in removed:
        moved = theta + torch.linalg.solve(H - at.hessian(DATA.x[[i]]) / N, G[i] / N)
        other = LeastSquares()
        other.W, other.b = moved[:80].reshape(4, 20), moved[80:]
        changes.append(losses(other) - losses(at))
    close(pivot(result, "measured"), torch.stack(changes, dim=1), 1e-3)


def frame_of(predicted, measured, converged=True):
    k, m = predicted.shape
    return pd.DataFrame({
        "removed": np.repeat(np.arange(m), k), "chosen": "random", "test": np.tile(np.arange(k), m),
        "predicted": predicted.T.flatten(), "newton": np.nan, "measured": measured.T.flatten(),
        "gradient_norm": 0.0, "iterations": 3, "converged": np.repeat(np.broadcast_to(converged, m), k),
    })  # fmt: skip


MEASURED = np.random.default_rng(0).normal(size=(4, 6))
NOISE = np.random.default_rng(1).normal(size=(4, 6))


@pytest.mark.parametrize(
    ("predicted", "verdict", "words"),
    [
        (MEASURED, "agrees", "agree with what happened: slope 1"),
        (0.75 * MEASURED, "agrees", "they are too small, about 0.75"),
        (0.2 * MEASURED, "partly", "they are too small, about 0.2"),
        (3.0 * MEASURED, "partly", "they are too large, about 3"),
        (NOISE, "disagrees", "do not agree"),
        (-MEASURED, "disagrees", "do not agree"),
    ],
)
def test_the_verdict(predicted, verdict, words):
    result = conclude(frame_of(predicted, MEASURED), {"maxiter": 9})
    assert result.verdict == verdict
    assert words in result.sentence
    slope, _ = np.polyfit(MEASURED.flatten(), predicted.flatten(), 1)
    assert result.slope == pytest.approx(slope)
    assert result.pearson == pytest.approx(np.corrcoef(MEASURED.flatten(), predicted.flatten())[0, 1])
    error = ((MEASURED - predicted) ** 2).sum() / ((MEASURED - MEASURED.mean()) ** 2).sum()
    assert result.r2 == pytest.approx(1 - error)
    assert json.loads(json.dumps(result.manifest()))["verdict"] == verdict


def test_what_did_not_converge_is_left_out_of_the_statistics():
    predicted = MEASURED.copy()
    predicted[:, 2] += 5
    converged = np.arange(6) != 2
    result = conclude(frame_of(predicted, MEASURED, converged), {"maxiter": 9})
    assert result.verdict == "agrees"
    assert result.slope == pytest.approx(1)
    assert "left out: 1" in result.sentence


@pytest.mark.parametrize("count", [1, 31, True])
def test_counts_that_make_no_sense(count):
    with pytest.raises(DataError, match="count must be"):
        verified(fitted(), count=count)


def test_scores_of_something_else():
    influence = fitted()
    test = (TESTS.x, TESTS.y)
    with pytest.raises(DataError, match="no plain scores"):
        verify(influence, influence.score(test, normalize="l-relatif"), test, 4, progress=False)
    with pytest.raises(DataError, match="the scores have 2 tests"):
        verify(influence, influence.score(test).rows([0, 1]), test, 4, progress=False)
    with pytest.raises(DataError, match='must be "auto"'):
        verified(influence, objective="other")


def test_weighted_fits():
    task = rf.Task(DATA.model(), loss="mse")
    influence = rf.Influence(task, "ggn", Dense(), 0.1, progress=False)
    influence.fit((DATA.x, DATA.y), weights=torch.ones(N))
    with pytest.raises(DataError, match="fit without weights"):
        verified(influence)
