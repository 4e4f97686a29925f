from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import refluence as rf
from refluence.errors import DataError, TaskError
from refluence.evaluation.baselines import (
    baseline_scores,
    embedding_neighbours,
    gradient_cosine,
    gradient_dot,
    loss_scores,
    random_scores,
)
from support.reference import loop_gradients


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3)).double()
    train, test = ((torch.randn(n, 5, dtype=torch.float64, generator=generator), torch.arange(n) % 3) for n in (11, 4))
    return rf.Task(model), train, test


def gradients(task, data):
    names = list(task.parameter_names())
    return loop_gradients(task.model, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), names, data)


def test_gradient_dot_and_cosine(problem):
    task, train, test = problem
    task.model.eval()
    V, G = gradients(task, test), gradients(task, train)
    torch.testing.assert_close(gradient_dot(task, train, test).values, V @ G.T)
    torch.testing.assert_close(gradient_cosine(task, train, test).values, F.normalize(V) @ F.normalize(G).T)


def test_the_cosine_with_a_measurement_of_its_own(problem):
    task, train, test = problem
    task.model.eval()
    margin = rf.Task(task.model, measurement="margin")
    found = gradient_cosine(margin, train, test).values
    names = list(task.parameter_names())

    def measured(model, batch):
        log_p = F.log_softmax(model(batch[0]), dim=1).gather(1, batch[1][:, None])[:, 0]
        return -(log_p - torch.log1p(-log_p.exp()))

    V, G = loop_gradients(task.model, measured, names, test), gradients(task, train)
    torch.testing.assert_close(found, F.normalize(V) @ F.normalize(G).T)


def test_losses_are_the_same_for_every_test(problem):
    task, train, test = problem
    task.model.eval()
    expected = F.cross_entropy(task.model(train[0]), train[1], reduction="none")
    torch.testing.assert_close(loss_scores(task, train, test).values, expected.repeat(4, 1))


def test_embeddings_are_what_goes_into_the_last_layer(problem):
    task, train, test = problem
    a, b = (torch.tanh(task.model[0](x)) for x, _ in (test, train))
    found = embedding_neighbours(task, train, test)
    torch.testing.assert_close(found.values, F.normalize(a) @ F.normalize(b).T)
    distances = (a[:, None] - b[None]).norm(dim=2)
    near = embedding_neighbours(task, train, test, layer="1", measure="distance")
    torch.testing.assert_close(near.values, -distances)


def test_sequences_are_averaged():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6))
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]])
    task = rf.Task(model)
    found = embedding_neighbours(task, (ids, ids), (ids[:1], ids[:1]))
    means = model[0](ids).mean(dim=1).double()
    torch.testing.assert_close(found.values, F.normalize(means[:1]) @ F.normalize(means).T)


def test_nothing_of_the_users_changes(problem):
    task, train, test = problem
    task.model.train()
    state, before = torch.random.get_rng_state(), {k: v.clone() for k, v in task.model.state_dict().items()}
    found = baseline_scores(task, train, test, progress=False)
    assert list(found) == ["random", "loss", "gradient dot", "gradient cosine", "embedding cosine"]
    assert all(scores.shape == (4, 11) for scores in found.values())
    assert all(module.training for module in task.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in task.model.modules())
    assert all(parameter.grad is None for parameter in task.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_hooks_go_also_after_an_error(problem):
    task, _, test = problem
    with pytest.raises(RuntimeError):
        embedding_neighbours(task, (torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)), test)
    assert not any(module._forward_pre_hooks for module in task.model.modules())


def test_random_scores_are_seeded_and_have_no_order():
    a, b = random_scores(3, 4000, seed=1), random_scores(3, 4000, seed=1)
    assert torch.equal(a.values, b.values)
    assert not torch.equal(a.values, random_scores(3, 4000, seed=2).values)
    np.testing.assert_allclose(np.corrcoef(a.values), np.eye(3), atol=0.08)


def test_wrong_layers_are_named(problem):
    task, train, test = problem
    with pytest.raises(TaskError, match="no layer 'fc': use one of 0, 1, 2, 3"):
        embedding_neighbours(task, train, test, layer="fc")
    with pytest.raises(DataError, match="measure"):
        embedding_neighbours(task, train, test, measure="dot")
    conv = rf.Task(nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten()))
    data = (torch.zeros(2, 1, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TaskError, match=r"last nn.Linear did not run"):
        embedding_neighbours(conv, data, data)
    assert "embedding cosine" not in baseline_scores(conv, data, data, progress=False)
