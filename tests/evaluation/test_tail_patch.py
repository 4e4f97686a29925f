from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from refluence import Scores
from refluence.errors import DataError
from refluence.evaluation.tail_patch import tail_patch
from support.digits_regression import DigitsRegression


@pytest.fixture(scope="module")
def problem():
    return DigitsRegression(n=80, k=6)


def by_hand(task, rows, train, test, i, optimizer):
    """log p of the test example after a step of the optimiser, minus before."""
    model = copy.deepcopy(task.model)

    def log_p():
        return -F.cross_entropy(model(test[0][i : i + 1]), test[1][i : i + 1]).item()

    before = log_p()
    step = optimizer(list(model.parameters()))
    F.cross_entropy(model(train[0][rows]), train[1][rows]).backward()
    step.step()
    return log_p() - before


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        ({"learning_rate": 0.3}, lambda p: torch.optim.SGD(p, lr=0.3)),
        ({"optimizer": lambda p: torch.optim.Adam(p, lr=0.01)}, lambda p: torch.optim.Adam(p, lr=0.01)),
    ],
)
def test_every_change_is_that_of_a_step(problem, options, optimizer):
    task = problem.task()
    values = torch.randn(6, 80, generator=torch.Generator().manual_seed(0))
    scores = Scores(values, 80, test_ids=np.arange(20, 26))
    found = tail_patch(task, scores, problem.train, problem.test, k=3, progress=False, **options)
    expected = [by_hand(task, values[i].topk(3).indices, problem.train, problem.test, i, optimizer) for i in range(6)]
    np.testing.assert_allclose(found.details["change"], expected, rtol=1e-10, atol=1e-14)
    assert float(found) == pytest.approx(np.mean(expected))
    assert found.details["test"].tolist() == list(range(20, 26))


def test_helpful_examples_help_and_random_ones_do_not(problem):
    scores = problem.influence().score(problem.test)
    found = tail_patch(problem.task(), scores, problem.train, problem.test, k=5, learning_rate=0.1, progress=False)
    worst = tail_patch(
        problem.task(), -scores.values, problem.train, problem.test, k=5, learning_rate=0.1, progress=False
    )
    assert found.low > 0.03
    assert worst.high < -0.03
    assert abs(found.details["random"].mean()) < 0.03


def test_the_model_is_left_as_it_was(problem):
    task = problem.task(parameters="0.weight")
    task.model.train()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    tail_patch(task, torch.randn(6, 80), problem.train, problem.test, k=2, learning_rate=1.0, progress=False)
    assert task.model.training
    assert all(p.grad is None and p.requires_grad for p in task.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


def test_only_attributed_parameters_move(problem):
    task = problem.task(parameters="0.bias")
    values = torch.randn(6, 80, generator=torch.Generator().manual_seed(0))
    found = tail_patch(task, values, problem.train, problem.test, k=3, learning_rate=0.3, progress=False)
    rows = values[0].topk(3).indices
    expected = by_hand(task, rows, problem.train, problem.test, 0, lambda p: torch.optim.SGD(p[1:], lr=0.3))
    assert found.details["change"][0] == pytest.approx(expected)


def test_wrong_input_is_named(problem):
    with pytest.raises(DataError, match=r"\(6, 79\), the data 6 test and 80 train"):
        tail_patch(problem.task(), torch.zeros(6, 79), problem.train, problem.test)
    with pytest.raises(DataError, match="k must be from 1 to the 80"):
        tail_patch(problem.task(), torch.zeros(6, 80), problem.train, problem.test, k=81)
