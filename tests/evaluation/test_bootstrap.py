from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from refluence.errors import DataError
from refluence.evaluation.bootstrap import (
    correlation_interval,
    mean_estimate,
    percentile_interval,
    resample_counts,
    weighted_means,
)


def test_resamples_draw_with_replacement():
    counts = resample_counts(20, 3000, 0, "tests")
    assert bool((counts.sum(dim=1) == 20).all())
    np.testing.assert_allclose(counts.mean(dim=0), 1, atol=0.1)
    np.testing.assert_allclose(counts.var(dim=0), 1 - 1 / 20, atol=0.15)
    assert torch.equal(counts, resample_counts(20, 3000, 0, "tests"))
    assert not torch.equal(counts, resample_counts(20, 3000, 0, "subsets"))
    assert not torch.equal(counts, resample_counts(20, 3000, 1, "tests"))


def test_percentiles_leave_out_nan():
    draws = torch.arange(101, dtype=torch.float64)
    low, high = percentile_interval(torch.cat([draws, torch.full((7,), math.nan, dtype=torch.float64)]), 0.9)
    assert (float(low), float(high)) == (pytest.approx(5), pytest.approx(95))
    with pytest.raises(DataError, match="between 0 and 1"):
        percentile_interval(draws, 1.0)


def test_weighted_means_leave_out_nan():
    values = torch.tensor([[1.0, 2.0, math.nan], [math.nan] * 3], dtype=torch.float64)
    weights = torch.tensor([[1.0, 2.0, 9.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    found = weighted_means(values, weights)
    assert float(found[0]) == pytest.approx(5 / 3)
    assert bool(found[1].isnan())


def test_a_mean_has_the_interval_of_its_standard_error():
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(400) + 3)
    found = mean_estimate("x", torch.cat([values, torch.tensor([math.nan])]), resamples=4000)
    half = 1.96 * stats.sem(values.numpy())
    assert (found.value, found.low, found.high) == (
        pytest.approx(float(values.mean())),
        pytest.approx(found.value - half, abs=0.1 * half),
        pytest.approx(found.value + half, abs=0.1 * half),
    )
    assert math.isnan(mean_estimate("x", values[:0]).value)


def test_a_correlation_is_inside_its_interval_even_where_resamples_lower_it():
    draws = 0.9 + 0.02 * torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = correlation_interval(0.97, draws)
    assert low < 0.97 < high < 1
    assert math.isnan(correlation_interval(math.nan, draws)[0])
    assert correlation_interval(1.0, torch.ones(3, dtype=torch.float64)) == (pytest.approx(1), 1.0)
    # far from ±1 Fisher's scale is linear, and only the move to the point is left
    low, high = correlation_interval(0.0, draws - 0.9)
    expected = percentile_interval(draws - draws.mean())
    assert (low, high) == (pytest.approx(float(expected[0]), rel=0.01), pytest.approx(float(expected[1]), rel=0.01))
