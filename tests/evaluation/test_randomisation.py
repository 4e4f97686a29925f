from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import refluence as rf
from refluence.evaluation.randomisation import randomisation
from refluence.training.fresh import fresh_model
from support.digits_regression import L2, DigitsRegression


@pytest.fixture(scope="module")
def problem():
    return DigitsRegression(n=60, k=5)


def fitted(task, train):
    return rf.Influence(task, solver=rf.solvers.Gram(), damping=0.05, progress=False).fit(train)


def test_the_correlation_is_that_with_an_untrained_model(problem):
    influence = fitted(problem.task(), problem.train)
    models = []

    def build():
        models.append(fresh_model(influence.task.model))
        return models[-1]

    found = randomisation(influence, problem.train, problem.test, models=2, build=build, progress=False)
    own = influence.score(problem.test).values
    expected = []
    for model in models:
        other = fitted(rf.Task(model, l2=L2), problem.train).score(problem.test).values
        expected += [spearmanr(a, b).statistic for a, b in zip(own, other, strict=True)]
    np.testing.assert_allclose(found.details["correlation"], expected, atol=1e-12)
    assert found.details["model"].tolist() == [0] * 5 + [1] * 5
    assert float(found) == pytest.approx(np.mean(expected))
    assert not torch.equal(models[0][0].weight, models[1][0].weight)


def test_scores_of_the_inputs_alone_do_not_change(problem):
    """A loss that the parameters enter linearly has the same gradients whatever they are."""
    task = rf.Task(nn.Linear(16, 10).double(), loss=lambda output, batch: output.sum(dim=1))
    found = randomisation(fitted(task, problem.train), problem.train, problem.test, progress=False)
    assert float(found) == pytest.approx(1)


def test_random_state_weights_and_model_are_kept(problem):
    task = problem.task()
    weights = torch.linspace(0, 2, 60, dtype=torch.float64)
    influence = rf.Influence(task, solver=rf.solvers.Gram(), damping=0.05, progress=False)
    influence.fit(problem.train, weights=weights)
    scores = influence.score(problem.test)
    before, state = task.model[0].weight.clone(), torch.random.get_rng_state()
    a = randomisation(influence, problem.train, problem.test, scores=scores, seed=4, progress=False)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(before, task.model[0].weight)
    b = randomisation(influence, problem.train, problem.test, seed=4, progress=False)
    assert a.details.equals(b.details)
    plain = randomisation(
        fitted(task, problem.train), problem.train, problem.test, scores=scores, seed=4, progress=False
    )
    assert not a.details.equals(plain.details)


def test_every_untrained_model_has_a_store_of_its_own(problem, tmp_path):
    solver, execution = rf.solvers.Sketched(rf.sketches.Gaussian(32)), rf.Execution(store=tmp_path)
    influence = rf.Influence(problem.task(), solver=solver, damping=5.0, progress=False, execution=execution)
    influence.fit(problem.train)
    first, again = (randomisation(influence, problem.train, problem.test, models=2, progress=False) for _ in range(2))
    assert first.details.equals(again.details)
    assert len([folder for folder in tmp_path.iterdir() if folder.name.startswith("untrained-")]) == 2
