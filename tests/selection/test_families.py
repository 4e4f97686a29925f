"""Each family of methods against its definition, by brute force."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import refluence as rf
from refluence.errors import DataError, TaskError
from refluence.selection import d_optimal, el2n, grand, herding, k_center, pivoted_qr
from refluence.selection.sampling import inclusion_probabilities
from support.reference import loop_gradients


def features(seed, n=40, d=5):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-4, 0.1, 10.0]), st.integers(1, 25))
def test_d_optimal_adds_most_to_the_log_determinant_at_each_step(seed, ridge, k):
    X = features(seed)
    A = len(X) * ridge * torch.eye(5, dtype=X.dtype)
    chosen = d_optimal(X, k, ridge).tolist()
    for step, row in enumerate(chosen):
        free = [i for i in range(len(X)) if i not in chosen[:step]]
        gains = torch.stack([torch.logdet(A + torch.outer(X[i], X[i])) for i in free])
        assert gains[free.index(row)] >= gains.max() - 1e-9
        A = A + torch.outer(X[row], X[row])
    assert len(set(chosen)) == k


def test_d_optimal_goes_on_to_the_last_row_past_the_rank():
    X = features(0, 300, 4)
    X = torch.cat([X, X[:20], torch.zeros(5, 4)]).double()
    assert sorted(d_optimal(X, len(X), 1e-3).tolist()) == list(range(len(X)))


def test_pivoted_qr_takes_the_row_farthest_from_the_span_and_is_d_optimal_without_a_ridge():
    X = features(1)
    chosen = pivoted_qr(X, 5).tolist()
    for step, row in enumerate(chosen):
        basis = torch.linalg.qr(X[chosen[:step]].T).Q if step else torch.zeros(5, 0, dtype=X.dtype)
        distance = (X - X @ basis @ basis.T).norm(dim=1)
        assert distance[row] >= distance.max() - 1e-9
    assert chosen == d_optimal(X, 5, 1e-9).tolist()


def test_pivoted_qr_knows_the_rank_of_deficient_features():
    X = features(2) @ torch.diag(torch.tensor([1.0, 1, 1, 0, 0])).double()
    with pytest.raises(DataError, match="the rank, 3, not 4"):
        pivoted_qr(X, 4)


def test_k_center_takes_the_farthest_row_and_covers_within_twice_the_optimum():
    X = features(3, 14, 2)
    chosen = k_center(X, 3).tolist()
    D = torch.cdist(X, X)
    assert chosen[0] == int((X - X.mean(dim=0)).norm(dim=1).argmin())
    for step in range(1, 3):
        nearest = D[:, chosen[:step]].amin(dim=1)
        assert nearest[chosen[step]] == nearest.max()
    best = min(float(D[:, list(c)].amin(dim=1).max()) for c in torch.combinations(torch.arange(14), 3).tolist())
    assert float(D[:, chosen].amin(dim=1).max()) <= 2 * best


@pytest.mark.parametrize("bandwidth", [None, 1.5])
def test_herding_follows_its_rule(bandwidth):
    X = features(4, 30, 3) + 1
    K = X @ X.T if bandwidth is None else torch.exp(-torch.cdist(X, X).square() / (2 * bandwidth**2))
    chosen = herding(X, 12, bandwidth).tolist()
    for step, row in enumerate(chosen):
        rule = K.mean(dim=1) - K[:, chosen[:step]].sum(dim=1) / (step + 1)
        rule[chosen[:step]] = -torch.inf
        assert rule[row] >= rule.max() - 1e-12


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30))
def test_inclusion_probabilities_are_capped_multiples_that_add_up_to_k(seed, k):
    sizes = features(seed, 30, 1)[:, 0].exp().square()
    pi = inclusion_probabilities(sizes, k)
    torch.testing.assert_close(pi.sum(), torch.tensor(float(k), dtype=pi.dtype))
    below = pi < 1
    if bool(below.any()):
        ratio = (pi / sizes)[below]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
        assert bool((sizes[~below] * ratio[0] >= 1 - 1e-12).all())


@pytest.fixture
def classifier():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [
            nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double() for _ in range(2)
        ]
    data = (features(5, 11, 4), torch.arange(11) % 3)
    return rf.Task(models[0]), data, models


def test_el2n_is_the_mean_length_of_the_error(classifier):
    task, data, models = classifier
    expected = torch.zeros(11, dtype=torch.float64)
    for model in models:
        model.eval()
        with torch.no_grad():
            expected += (model(data[0]).softmax(dim=1) - F.one_hot(data[1], 3)).norm(dim=1) / 2
        model.train()
    torch.testing.assert_close(el2n(task, data, models), expected)
    torch.testing.assert_close(el2n(task, data, [model.state_dict() for model in models]), expected)
    assert models[0].training


def test_grand_is_the_mean_norm_of_the_gradient(classifier):
    task, data, models = classifier
    expected = torch.zeros(11, dtype=torch.float64)
    for model in models:
        model.eval()
        names = list(task.parameter_names())
        loss = lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")  # noqa: E731
        expected += loop_gradients(model, loss, names, data).norm(dim=1) / 2
        model.train()
    torch.testing.assert_close(grand(task, data, models), expected)


def test_difficulty_needs_models_and_el2n_a_classifier(classifier):
    task, data, models = classifier
    with pytest.raises(DataError, match="EL2N is a mean over models"):
        el2n(task, data, [])
    with pytest.raises(TaskError, match="EL2N is of classifiers"):
        el2n(rf.Task(models[0], loss="mse"), data, models)
