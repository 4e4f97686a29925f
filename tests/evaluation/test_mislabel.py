from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

import refluence as rf
from refluence.errors import DataError
from refluence.evaluation.mislabel import mislabel
from refluence.zoo import load_dataset


@settings(max_examples=40, deadline=None)
@given(data=st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=4, max_size=30))
def test_against_scikit_learn(data):
    values = torch.tensor([value for value, _ in data], dtype=torch.float64)
    wrong = torch.tensor([True, False, *[flag for _, flag in data[2:]]])
    found = mislabel(values, wrong, resamples=5)
    assert float(found.auroc) == pytest.approx(roc_auc_score(wrong, values))
    assert float(found.average_precision) == pytest.approx(average_precision_score(wrong, values))
    # the expected curve over the order of ties has this area, piecewise linear as it is
    corners = [(0.0, 0.0)]
    for level in sorted(set(values.tolist()), reverse=True):
        seen = values >= level
        corners.append((float(seen.double().mean()), float((seen & wrong).sum() / wrong.sum())))
    assert float(found.area) == pytest.approx(np.trapezoid(*np.array(corners).T[::-1]))
    np.testing.assert_allclose(found.curve["found"], np.interp(found.curve["inspected"], *np.array(corners).T))


def test_a_perfect_order_has_the_best_curve():
    values, wrong = torch.arange(100.0), torch.arange(90, 100)
    found = mislabel(values, wrong)
    assert float(found.auroc) == float(found.average_precision) == 1
    assert float(found.area) == pytest.approx(found.best_area) == 0.95
    np.testing.assert_allclose(found.curve["found"], found.curve["best"])


def test_the_order_of_the_rows_does_not_matter():
    """60,000 examples of tiny scores, all wrong ones above: a jitter by index would bury them."""
    values = torch.full((60_000,), 1e-3)
    values[-600:] = 2e-3
    found = mislabel(values, torch.arange(59_400, 60_000), resamples=2)
    assert float(found.area) == pytest.approx(0.995)
    constant = mislabel(torch.zeros(50), [3, 4], resamples=2)
    assert float(constant.auroc) == float(constant.area) == 0.5
    np.testing.assert_allclose(constant.curve["found"], constant.curve["inspected"])


def test_the_interval_of_the_auroc_is_its_sampling_error():
    """Coverage of nominal 95 % for normal scores whose AUROC is known."""
    generator = np.random.default_rng(0)
    expected, covered = 0.760, 0  # Φ(1/√2)
    for trial in range(80):
        values = np.concatenate([generator.standard_normal(40) + 1, generator.standard_normal(160)])
        found = mislabel(values, np.arange(40), resamples=200, seed=trial).auroc
        covered += found.low <= expected <= found.high
    assert 0.9 <= covered / 80 <= 0.99


def test_rows_or_booleans():
    values = torch.tensor([1.0, 5.0, 3.0, 2.0])
    a, b = mislabel(values, [1, 3]), mislabel(values, torch.tensor([False, True, False, True]))
    assert a.to_frame().equals(b.to_frame())
    assert a.to_frame()["metric"].tolist() == ["auroc", "average_precision", "detection_area"]


def test_self_influence_finds_flipped_digits():
    data = load_dataset("digits", n_train=300, n_test=1)
    x, y = data.train[0].flatten(1), data.train[1].clone()
    wrong = torch.arange(0, 300, 10)
    y[wrong] = (y[wrong] + 1 + torch.arange(30) % 9) % 10
    model = torch.nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    influence = rf.Influence(rf.Task(model, l2=1e-3), solver=rf.solvers.Gram(), damping=1e-2, progress=False)
    found = mislabel(influence.fit((x, y)).self_influence(), wrong)
    assert found.auroc.low > 0.8
    assert float(found.average_precision) > 0.4


@pytest.mark.parametrize(
    "wrong", [[], [4], [-1], [0.5], torch.ones(4, dtype=torch.bool), torch.ones(3, dtype=torch.bool)]
)
def test_impossible_rows(wrong):
    with pytest.raises(DataError, match=r"wrong|rows"):
        mislabel(torch.arange(4.0), wrong)


def test_impossible_values():
    with pytest.raises(DataError, match="one finite number"):
        mislabel(torch.zeros(2, 3), [0])
    with pytest.raises(DataError, match="one finite number"):
        mislabel(torch.tensor([1.0, torch.nan]), [0])


def test_a_mask_of_integers_is_not_taken_for_rows():
    with pytest.raises(DataError, match="twice"):
        mislabel(torch.arange(6.0), np.array([0, 1, 0, 0, 1, 0]))
    with pytest.raises(DataError, match="0 of 6 labels are wrong"):
        mislabel(torch.arange(6.0), [])
