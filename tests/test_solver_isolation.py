"""What is the user's is as before, with every solver on every curvature, also after an error."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from refluence.errors import PlanError, RefluenceError, SolverError
from refluence.solvers import Dense, Lissa
from support.least_squares import CURVATURES, all_solvers, fitted, linear


def state_of(model):
    return [
        (id(p), p.requires_grad, None if p.grad is None else p.grad.clone(), p.detach().clone())
        for p in model.parameters()
    ], [(m.training, len(m._forward_hooks), len(m._backward_hooks), sorted(vars(m))) for m in model.modules()]


def assert_untouched(model, before, random):
    after = state_of(model)
    assert after[1] == before[1]
    for one, other in zip(after[0], before[0], strict=True):
        assert one[:2] == other[:2]
        assert (one[2] is None) == (other[2] is None)
        assert one[2] is None or torch.equal(one[2], other[2])
        assert torch.equal(one[3], other[3])
    assert torch.equal(torch.get_rng_state(), random[0])
    assert np.array_equal(np.random.get_state()[1], random[1])  # noqa: NPY002
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("curvature", CURVATURES)
@all_solvers
def test_nothing_of_the_users_changes(solver, curvature):
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    model[2].eval()
    train, test = linear()[1], linear(n=3, seed=1)[1]
    if isinstance(solver, Lissa):  # the steps are all the same
        solver = replace(solver, tolerance=0.3)
    before = state_of(model)
    random = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            influence = fitted(model, train, solver, curvature, damping=2.0)
            influence.score(test)
            influence.self_influence()
            influence.inverse_hvp(test)
            influence.perturbation(test, rows=[0, 3])
        except (PlanError, SolverError):
            pass
    assert_untouched(model, before, random)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_nothing_of_the_users_changes_after_an_error_in_their_loss(curvature):
    calls = []

    def failing(output, batch):
        calls.append(1)
        if len(calls) > failing.after:
            raise KeyError("the user's own")
        return (output - batch[1]).square().mean(dim=1)

    model, train = linear()
    before = state_of(model)
    random = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for failing.after in (0, 4, 9):
        calls.clear()
        with pytest.raises((KeyError, RefluenceError)):
            fitted(model, train, Dense(), curvature, loss=failing, batch_size=5).score(train)
        assert_untouched(model, before, random)
