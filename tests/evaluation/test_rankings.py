"""Agreement of rankings against counts over pairs and prefixes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refluence.errors import DataError
from refluence.evaluation.rankings import (
    corrected_overlap,
    kendall_tau,
    ordering,
    overlap_by_chance,
    overlaps,
    rank_biased_overlap,
    spearman_rho,
    swap_fraction,
)

rankings = st.integers(2, 30).flatmap(
    lambda n: st.tuples(*(st.permutations(range(n)).map(lambda p: torch.tensor(p, dtype=torch.float64)),) * 2)
)


@settings(max_examples=50, deadline=None)
@given(rankings)
def test_tau_and_swaps_count_pairs(pair):
    a, b = pair
    pairs = list(itertools.combinations(range(len(a)), 2))
    swapped = sum(bool((a[i] - a[j]) * (b[i] - b[j]) < 0) for i, j in pairs) / len(pairs)
    tau = kendall_tau(a, b)
    assert tau == pytest.approx(1 - 2 * swapped)
    assert swap_fraction(tau) == pytest.approx(swapped)


@settings(max_examples=50, deadline=None)
@given(rankings)
def test_overlaps_count_common_items_of_the_tops(pair):
    a, b = pair
    n = len(a)
    top = [ordering(scores).tolist() for scores in pair]
    expected = [len(set(top[0][:k]) & set(top[1][:k])) for k in range(1, n + 1)]
    assert overlaps(a, b).tolist() == expected
    p = 1 - 1 / 3.5
    rbo = (1 - p) * sum(p ** (k - 1) * o / k for k, o in enumerate(expected, 1)) + p**n
    assert rank_biased_overlap(overlaps(a, b), 3.5) == pytest.approx(rbo)


def test_a_ranking_agrees_with_itself_and_its_reverse_with_nothing():
    a = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert kendall_tau(a, a) == pytest.approx(1)
    assert spearman_rho(a, -a) == pytest.approx(-1)
    assert rank_biased_overlap(overlaps(a, a), 10) == pytest.approx(1)
    k = torch.tensor([5, 25, 50])
    same = corrected_overlap(overlaps(a, a)[k - 1].double(), k, 50)
    assert same[:2].tolist() == [1, 1]
    assert math.isnan(same[2])
    assert corrected_overlap(overlaps(a, -a)[k - 1].double(), k, 50)[0] == pytest.approx(-0.1 / 0.9)


def test_ties_keep_the_order_of_the_items():
    assert ordering(torch.tensor([1.0, 2.0, 2.0, 1.0], dtype=torch.float64)).tolist() == [1, 2, 0, 3]


def test_the_overlap_of_chance_is_that_of_random_rankings():
    """The mean of 2,000 pairs is within four standard errors; about 0.1 % lie outside either quantile."""
    n, k = 60, torch.tensor([3, 20, 45])
    generator = torch.Generator().manual_seed(1)
    found = torch.stack(
        [overlaps(*torch.rand(2, n, dtype=torch.float64, generator=generator))[k - 1] for _ in range(2_000)]
    ).double()
    mean, low, high = overlap_by_chance(k, n)
    error = found.std(dim=0) / math.sqrt(len(found))
    assert bool(((found.mean(dim=0) - mean).abs() < 4 * error).all())
    outside = ((found < low) | (found > high)).double().mean()
    assert float(outside) <= 0.004
    assert bool(((low <= mean) & (mean <= high)).all())


def test_the_null_of_seventy_thousand_items():
    mean, _, high = overlap_by_chance(torch.tensor([300]), 70_000)
    assert float(mean) == pytest.approx(1.2857, abs=1e-4)
    assert float(high) == 6


def test_errors_name_the_thing():
    a = torch.arange(4, dtype=torch.float64)
    with pytest.raises(DataError, match="same items"):
        kendall_tau(a[:1], a[:1])
    with pytest.raises(DataError, match="no rank"):
        overlaps(a, a * np.nan)
    with pytest.raises(DataError, match="above 1"):
        rank_biased_overlap(overlaps(a, a), 1.0)
    with pytest.raises(DataError, match="tail"):
        overlap_by_chance(torch.tensor([1]), 4, 0.7)
