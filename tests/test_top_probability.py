"""The probability of being among the k largest, against counting in samples and against two that have a formula."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from refluence import top_probability
from refluence.top_probability import probability_in_top

SAMPLES = 100_000


def counted(mean, deviation, count, seed=0):
    """Shares of samples in which each is among the `count` largest."""
    draws = mean + deviation * np.random.default_rng(seed).standard_normal((SAMPLES, mean.size))
    chosen = np.argpartition(-draws, count - 1, axis=1)[:, :count]
    return np.bincount(chosen.ravel(), minlength=mean.size) / SAMPLES


def probability(mean, deviation, count):
    return probability_in_top(torch.as_tensor(mean)[None], torch.as_tensor(deviation)[None], count)[0].numpy()


ERRORS = {
    "equal": lambda draw, n: np.full(n, 0.5),
    "unequal": lambda draw, n: draw.gamma(1.0, 1.0, n),
    "some a thousandth": lambda draw, n: draw.gamma(2.0, 0.5, n) * draw.choice([1e-3, 1.0], n),
    "small": lambda draw, n: np.full(n, 0.02),
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize(("n", "count"), [(2, 1), (6, 1), (6, 5), (25, 3), (25, 18), (60, 10)])
def test_it_is_how_often_each_is_among_the_largest(kind, n, count):
    draw = np.random.default_rng(n + count)
    mean, deviation = draw.standard_normal(n), ERRORS[kind](draw, n)
    found, expected = probability(mean, deviation, count), counted(mean, deviation, count)
    noise = 4.5 * np.sqrt(expected * (1 - expected) / SAMPLES) + 3 / SAMPLES
    assert np.all(np.abs(found - expected) <= noise + 1.5e-3)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 29))
def test_the_probabilities_add_up_to_the_count_and_mirror(seed, count):
    draw = np.random.default_rng(seed)
    mean, deviation = draw.standard_normal(30), draw.gamma(1.0, 0.5, 30)
    found = probability(mean, deviation, count)
    assert found.sum() == pytest.approx(count, abs=5e-3)
    np.testing.assert_allclose(1 - probability(-mean, deviation, 30 - count), found, atol=2e-3)
    order = draw.permutation(30)
    np.testing.assert_allclose(probability(mean[order], deviation[order], count), found[order], atol=1e-12)
    np.testing.assert_allclose(probability(1e9 * mean + 1e9, 1e9 * deviation, count), found, atol=1e-6)


def test_of_two_it_is_the_probability_of_the_difference():
    for difference in np.linspace(-6, 6, 13):
        expected = norm.cdf(difference / np.hypot(0.3, 2.0))
        found = probability(np.array([difference, 0.0]), np.array([0.3, 2.0]), 1)
        np.testing.assert_allclose(found, [expected, 1 - expected], atol=1e-3)


def test_equal_ones_share_the_places_also_without_errors():
    np.testing.assert_allclose(probability(np.zeros(20), np.ones(20), 5), 0.25, atol=1e-3)
    np.testing.assert_allclose(probability(np.zeros(20), np.zeros(20), 5), 0.25, atol=1e-2)


def test_without_errors_the_largest_are_certain():
    mean = np.random.default_rng(0).standard_normal(500)
    for count in (1, 17, 480, 500, 900):
        expected = np.zeros(500)
        expected[np.argsort(-mean)[:count]] = 1
        np.testing.assert_array_equal(probability(mean, np.zeros(500), count), expected)


def test_each_row_is_its_own_and_its_dtype_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    values, errors = torch.randn(4, 40, generator=generator), torch.rand(4, 40, generator=generator)
    found = probability_in_top(values, errors, 6)
    assert found.dtype == torch.float64
    for i in range(4):
        torch.testing.assert_close(probability_in_top(values[i : i + 1], errors[i : i + 1], 6)[0], found[i])
    assert probability_in_top(values[:0], errors[:0], 6).shape == (0, 40)


def test_a_long_row_is_computed_in_pieces_that_change_nothing(monkeypatch):
    draw = np.random.default_rng(0)
    mean, deviation = draw.standard_normal(400), np.full(400, 0.4)
    found = probability(mean, deviation, 20)
    assert found.sum() == pytest.approx(20, abs=1e-2)
    monkeypatch.setattr(top_probability, "TABLE_NUMBERS", 30_000)
    np.testing.assert_allclose(probability(mean, deviation, 20), found, rtol=1e-12, atol=1e-15)
