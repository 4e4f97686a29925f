"""`rf.select`: what each method chooses, by its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import refluence as rf
from refluence.errors import DataError
from refluence.selection import METHODS, Selection
from refluence.selection.balance import quotas


@pytest.fixture
def X():
    return torch.randn(60, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp()


@pytest.fixture
def labels():
    return torch.arange(60) % 3


def arguments(method):
    return {"ridge": 0.1} if method == "d_optimal" else {}


def test_top_and_bottom_take_the_first_of_equal_scores():
    scores = torch.tensor([1.0, 3.0, 3.0, 0.0, 2.0, 0.0])
    assert rf.select(scores, 3).indices.tolist() == [1, 2, 4]
    assert rf.select(scores, 3, "bottom").indices.tolist() == [3, 5, 0]
    assert rf.select(scores, 3).weights.tolist() == [1, 1, 1]


def test_features_are_scored_by_their_leverage(X):
    leverage = (X @ torch.linalg.inv(X.T @ X) * X).sum(dim=1)
    assert rf.select(X, 9).indices.tolist() == leverage.argsort(descending=True)[:9].tolist()
    ridge = (X @ torch.linalg.inv(X.T @ X + len(X) * 2.0 * torch.eye(7)) * X).sum(dim=1)
    assert rf.select(X, 9, ridge=2.0).indices.tolist() == ridge.argsort(descending=True)[:9].tolist()
    given_scores = rf.select(rf.leverage_scores(X, 2.0), 9)
    assert given_scores.indices.tolist() == rf.select(X, 9, ridge=2.0).indices.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_rows_each_once(X, method):
    k = 7 if method == "pivoted_qr" else 12
    first, again = (rf.select(X, k, method, seed=3, **arguments(method)) for _ in range(2))
    assert torch.equal(first.indices, again.indices)
    assert torch.equal(first.weights, again.weights)
    assert len(first.indices.unique()) == len(first)
    assert len(first) == k or method == "sampling"
    assert first.n == 60
    assert first.method == method
    if method in ("random", "sampling", "distinct_sampling"):
        assert not torch.equal(first.indices, rf.select(X, k, method, seed=4).indices)


@pytest.mark.parametrize("method", METHODS)
def test_balanced_is_the_method_within_each_class(X, labels, method):
    chosen = rf.select(X, 13, method, labels=labels, **arguments(method))
    if method != "sampling":
        assert torch.bincount(labels[chosen.indices]).tolist() == [5, 4, 4]
        assert labels[chosen.indices[:3]].tolist() == [0, 1, 2]
    if method in ("top", "bottom"):
        leverage = rf.leverage_scores(X).values
        within = chosen.indices[labels[chosen.indices] == 1]
        rows = (labels == 1).nonzero()[:, 0]
        expected = rows[leverage[rows].argsort(descending=method == "top")[:4]]
        assert within.tolist() == expected.tolist()
    if method in ("d_optimal", "herding", "k_center", "pivoted_qr"):
        rows = (labels == 2).nonzero()[:, 0]
        alone = rows[rf.select(X[rows], 4, method, **arguments(method)).indices]
        assert chosen.indices[labels[chosen.indices] == 2].tolist() == alone.tolist()


@pytest.mark.parametrize("method", ["random", "sampling", "distinct_sampling"])
@pytest.mark.parametrize("balanced", [False, True])
def test_weighted_sums_are_unbiased(X, labels, method, balanced):
    """Over 1,000 seeds the mean of Σ w f is within four standard errors of Σ f over all rows."""
    f = X[:, 0].square()
    scores = rf.leverage_scores(X, 0.5).values
    kwargs = {"labels": labels} if balanced else {}
    sums = []
    for seed in range(1_000):
        chosen = rf.select(scores, 9, method, seed=seed, **kwargs)
        sums.append(float(chosen.weights @ f[chosen.indices]))
    error = np.std(sums, ddof=1) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - float(f.sum())) < 4 * error
    assert error < 0.05 * float(f.sum())


def test_draws_with_replacement_that_meet_have_the_sum_of_their_weights():
    scores = torch.tensor([6.0, 3.0, 1.0, 0.0])
    chosen = rf.select(scores, 50, "sampling", seed=1)
    assert sorted(chosen.indices.tolist()) == [0, 1, 2]
    draws = chosen.weights * 50 * scores[chosen.indices] / 10
    torch.testing.assert_close(draws, draws.round())
    assert draws.sum() == 50


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.data())
def test_quotas_are_as_even_as_the_classes_allow(sizes, data):
    total = sum(sizes)
    k = data.draw(st.integers(0, total))
    found = quotas(torch.tensor(sizes), k).tolist()
    assert sum(found) == k
    assert all(0 <= f <= s for f, s in zip(found, sizes, strict=True))
    assert all(
        max(found) - f <= 1 for f, s in zip(found, sizes, strict=True) if f < s
    )  # a class below its size has at most one less than any other


def test_a_selection_comes_back_from_its_file(X, labels, tmp_path):
    chosen = rf.select(X, 8, "sampling", labels=labels, ridge=rf.EffectiveDimension(3.0), seed=5)
    path = chosen.save(tmp_path / "chosen.safetensors")
    loaded = Selection.load(path)
    assert torch.equal(loaded.indices, chosen.indices)
    assert torch.equal(loaded.weights, chosen.weights)
    assert (loaded.n, loaded.method, loaded.settings) == (chosen.n, chosen.method, chosen.settings)
    frame = loaded.to_frame()
    assert list(frame.columns) == ["rank", "row", "weight"]
    assert frame["row"].tolist() == chosen.indices.tolist()
    chosen.save(path)
    other = tmp_path / "other"
    other.write_text("mine")
    with pytest.raises(DataError, match="holds no selection"):
        chosen.save(other)
    with pytest.raises(DataError, match="holds no selection"):
        Selection.load(other)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda X: rf.select(X, 3, "best"), "method must be one of"),
        (lambda X: rf.select(X, 0), "k must be an integer"),
        (lambda X: rf.select(X, 61), "61 of 60 rows"),
        (lambda X: rf.select(X[:, 0], 3, "k_center"), "needs features"),
        (lambda X: rf.select(X[:, 0], 3, ridge=1.0), "leave it out"),
        (lambda X: rf.select(X, 3, "herding", ridge=1.0), "leave it out"),
        (lambda X: rf.select(X, 3, "top", bandwidth=1.0), "leave it out"),
        (lambda X: rf.select(X, 3, "herding", bandwidth=0.0), "bandwidth of herding"),
        (lambda X: rf.select(X, 3, "d_optimal"), "needs a ridge"),
        (lambda X: rf.select(X, 3, "d_optimal", ridge=0.0), "ridge above 0"),
        (lambda X: rf.select(X, 8, "pivoted_qr"), "the rank, 7, not 8"),
        (lambda X: rf.select(X * torch.nan, 3), "row 0 holds NaN"),
        (lambda X: rf.select(X[:, 0] - 100, 3, "sampling"), "finite and ≥ 0"),
        (lambda X: rf.select(X[:, 0] * 0, 3, "sampling"), "above 0"),
        (lambda X: rf.select((torch.arange(60) < 2).double(), 3, "distinct_sampling"), "2 have a size above 0"),
        (lambda X: rf.select(X, 3, labels=[1, 2]), "labels must be one for each"),
    ],
)
def test_errors_name_the_thing(X, wrong, message):
    with pytest.raises(DataError, match=message):
        wrong(X)
