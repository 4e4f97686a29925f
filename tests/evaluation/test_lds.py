"""The LDS against scipy, one test at a time; its interval against simulations in which the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

import refluence as rf
from refluence.errors import DataError
from refluence.evaluation import GroundTruth
from refluence.evaluation.bootstrap import resample_counts
from refluence.evaluation.correlation import ranks, spearman_columns
from refluence.evaluation.lds import lds, lds_difference
from support.digits_regression import DigitsRegression, halves


def truth_of(masks, measured):
    return GroundTruth(masks, {"loss": torch.as_tensor(measured, dtype=torch.float64)[:, None]})


@pytest.fixture(scope="module")
def noisy():
    """Scores (9, 60) and 25 subsets whose measurements follow them, with noise, and with ties from rounding."""
    generator = torch.Generator().manual_seed(3)
    masks, scores = halves(60, 25), torch.randn(9, 60, generator=generator)
    measured = -(masks.double() @ scores.double().T) + 4 * torch.randn(25, 9, generator=generator)
    return scores, truth_of(masks, measured.round())


def test_every_test_is_what_scipy_says(noisy):
    scores, truth = noisy
    result = lds(scores, truth)
    sums = truth.masks.double().numpy() @ scores.double().numpy().T
    measured = truth.values().numpy()
    expected = [spearmanr(sums[:, i], -measured[:, i]).statistic for i in range(9)]
    assert min(len(np.unique(column)) for column in measured.T) < 25
    np.testing.assert_allclose(result.details["correlation"], expected, rtol=0, atol=1e-12)
    assert float(result) == pytest.approx(np.mean(expected), abs=1e-12)
    assert result.low < float(result) < result.high


def test_the_mean_over_seeds_is_what_is_ranked():
    masks = halves(10, 6)
    losses = torch.randn(6, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = torch.randn(2, 10, generator=torch.Generator().manual_seed(1))
    a = lds(scores, GroundTruth(masks, {"margin": losses}), measurement="margin")
    b = lds(scores, truth_of(masks, losses.mean(dim=1)))
    assert a.details.equals(b.details)


def test_sign_and_scale():
    masks, scores = halves(30, 20), torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = truth_of(masks, -(masks.double() @ scores.T))
    perfect = lds(scores, truth)
    assert (float(perfect), perfect.high) == (pytest.approx(1), pytest.approx(1))
    assert float(lds(-scores, truth)) == pytest.approx(-1)
    assert float(lds(scores * 1e-6 + 5, truth)) == pytest.approx(1)  # halves are of one size, so a constant adds none


@settings(max_examples=40, deadline=None)
@given(
    x=st.lists(st.integers(0, 4), min_size=5, max_size=9),
    y=st.lists(st.integers(0, 4), min_size=9, max_size=9),
    seed=st.integers(0, 9),
)
def test_a_resample_is_the_repeated_data(x, y, seed):
    """Weighted ranks and correlations are those of scipy on data in which item i stands w_i times."""
    m = len(x)
    weights = resample_counts(m, 4, seed, "subsets")
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y[:m], dtype=torch.float64)
    ranked = ranks(a, weights.T.contiguous())
    found = spearman_columns(a[:, None], b[:, None], weights.T.contiguous())[:, 0]
    for r, w in enumerate(weights.long()):
        repeated, other = a.repeat_interleave(w).numpy(), b.repeat_interleave(w).numpy()
        np.testing.assert_array_equal(ranked[:, r].repeat_interleave(w).numpy(), rankdata(repeated))
        if len(set(repeated)) > 1 and len(set(other)) > 1:
            assert float(found[r]) == pytest.approx(spearmanr(repeated, other).statistic, abs=1e-12)
        else:
            assert bool(found[r].isnan())


def test_constant_tests_are_left_out_and_said(noisy):
    scores, truth = noisy
    scores = scores.double().clone()
    scores[2] = 0.1  # sums of equal numbers of 0.1 differ by rounding
    scores[5] = 0
    with pytest.warns(UserWarning, match="2 of 9 test examples"):
        result = lds(scores, truth)
    assert result.details["correlation"].isna().tolist() == [i in (2, 5) for i in range(9)]
    others = [i for i in range(9) if i not in (2, 5)]
    assert float(result) == pytest.approx(float(lds(scores[others], truth.tests(others))))
    with pytest.warns(UserWarning, match="9 of 9"):
        nothing = lds(torch.zeros(9, 60), truth)
    assert np.isnan([float(nothing), nothing.low, nothing.high]).all()


def test_the_same_seed_gives_the_same_interval(noisy):
    scores, truth = noisy
    a, b, c = (lds(scores, truth, seed=seed) for seed in (1, 1, 2))
    assert (a.low, a.high) == (b.low, b.high) != (c.low, c.high)
    wide = lds(scores, truth, seed=1, confidence=0.99)
    assert wide.low < a.low < a.high < wide.high


def test_the_difference_of_two_methods_is_known_better_than_either(noisy):
    scores, truth = noisy
    other = scores + 0.2 * torch.randn(scores.shape, generator=torch.Generator().manual_seed(0))
    a, b, difference = lds(scores, truth), lds(other, truth), lds_difference(scores, other, truth)
    assert float(difference) == pytest.approx(float(a) - float(b))
    assert difference.high - difference.low < 0.7 * (a.high - a.low)
    same = lds_difference(scores, scores, truth)
    assert (same.low, float(same), same.high) == (0, 0, 0)


@pytest.mark.parametrize(("subsets", "tests", "correlation"), [(40, 20, 0.4), (30, 20, 0.985)])
def test_the_interval_covers_the_truth(subsets, tests, correlation):
    """Gaussian sums and losses of known correlation, with noise shared by the tests: coverage of nominal 95 %."""
    generator = np.random.default_rng(0)
    rank, kendall = (c / np.pi * np.arcsin(correlation / d) for c, d in ((6, 2), (2, 1)))
    expected = ((subsets - 2) * rank + 3 * kendall) / (subsets + 1)  # E of Spearman's coefficient (Kendall 1948)
    trials, covered, means = 80, 0, []
    for trial in range(trials):
        shared = np.sqrt(0.3) * generator.standard_normal((2, subsets, 1))
        a, e = shared + np.sqrt(0.7) * generator.standard_normal((2, subsets, tests))
        losses = -(correlation * a + np.sqrt(1 - correlation**2) * e)
        # one train example for each subset makes the sums what they are drawn as
        result = lds(
            torch.from_numpy(a.T), truth_of(torch.eye(subsets, dtype=torch.bool), losses), resamples=200, seed=trial
        )
        covered += result.low <= expected <= result.high
        means.append(float(result))
    assert np.mean(means) == pytest.approx(expected, abs=4 * np.std(means) / trials**0.5)
    assert covered / trials >= 0.92


def test_exact_influence_orders_refits_of_halves_of_digits():
    problem = DigitsRegression()
    result = lds(problem.influence().score(problem.test), problem.retrain(halves(problem.n, 20)))
    assert result.low > 0.95
    assert result.details["test"].tolist() == list(range(problem.k))


def test_wrong_input_is_named(noisy):
    scores, truth = noisy
    with pytest.raises(DataError, match=r"scores have shape \(9, 59\).*9 test and 60 train"):
        lds(scores[:, :59], truth)
    with pytest.raises(DataError, match="test row 4 hold NaN"):
        lds(torch.where(torch.arange(9)[:, None] == 4, torch.nan, scores), truth)
    with pytest.raises(DataError, match="'margin'"):
        lds(scores, truth, measurement="margin")
    with pytest.raises(DataError, match="2 subsets"):
        lds(scores, GroundTruth(truth.masks[:2], {"loss": truth.measurements["loss"][:2]}))
    with pytest.raises(DataError, match="confidence"):
        lds(scores, truth, confidence=95)
    with pytest.raises(DataError, match="resamples"):
        lds(scores, truth, resamples=0)
    diverged = truth.measurements["loss"].clone()
    diverged[7, 0, 2] = torch.nan
    with pytest.raises(DataError, match="first of subset 7"):
        lds(scores, GroundTruth(truth.masks, {"loss": diverged}))


def test_scores_objects_are_taken(noisy):
    scores, truth = noisy
    named = rf.Scores(scores, 60, test_ids=np.arange(100, 109))
    assert lds(named, truth).details["test"].tolist() == list(range(100, 109))
