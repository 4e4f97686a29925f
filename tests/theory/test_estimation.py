"""Effective dimensions with intervals, against the exact ones of dense matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refluence.errors import RefluenceError
from refluence.theory import (
    damping_for,
    effective_dimension,
    stochastic_effective_dimension,
    stochastic_spectrum,
    subsampled_effective_dimension,
)

few = settings(max_examples=25, deadline=None, derandomize=True)


def rotated(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))[0]
    return Q * values @ Q.T


@few
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 12), log_damping=st.floats(-4, 1), rank=st.integers(1, 30))
def test_the_quadratures_bracket_every_vector(seed, steps, log_damping, rank):
    """With any number of steps: below by the Radau rule, above by the Gauss rule."""
    values = torch.cat([torch.logspace(1, -3, rank), torch.zeros(30 - rank)]).double()
    C, damping = rotated(values, seed), 10.0**log_damping
    found = stochastic_spectrum(lambda V: C @ V, 30, probes=4, steps=steps, seed=seed)
    above = 30 * (found.weights * found.nodes / (found.nodes + damping)).sum(1)
    below = 30 * (found.radau_weights * found.radau_nodes / (found.radau_nodes + damping)).sum(1)
    signs = 1 - 2 * torch.randint(2, (4, 30), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    exact = ((signs.double() @ C @ torch.linalg.inv(C + damping * torch.eye(30))) * signs).sum(1)
    assert (below <= exact * (1 + 1e-6) + 1e-6).all()
    assert (above >= exact * (1 - 1e-6) - 1e-6).all()
    torch.testing.assert_close(found.radau_weights.sum(1), torch.ones(4).double())


def test_enough_steps_close_the_bracket():
    values = torch.logspace(1, -3, 25).double()
    C = rotated(values)
    found = stochastic_spectrum(lambda V: C @ V, 25, probes=3, steps=25)
    for damping in (1e-3, 0.1, 3.0):
        share = found.nodes / (found.nodes + damping)
        below = found.radau_nodes / (found.radau_nodes + damping)
        torch.testing.assert_close((found.weights * share).sum(1), (found.radau_weights * below).sum(1))


@pytest.mark.parametrize("steps", [6, 30])
def test_its_intervals_cover_as_often_as_they_say(steps):
    values = torch.cat([torch.logspace(1, -4, 60), torch.zeros(20)]).double()
    C, exact, covered = rotated(values), effective_dimension(values, 0.01), 0
    for seed in range(150):
        found = stochastic_effective_dimension(lambda V: C @ V, 80, 0.01, 6, steps, seed, confidence=0.8)
        covered += found.low <= exact <= found.high
        assert found.low <= float(found) <= found.high
    # Two standard errors of 150 draws are 6.5 %; with few steps the bracket of the quadrature makes it wider.
    assert covered / 150 > 0.73
    assert steps < 30 or covered / 150 < 0.87


def test_one_run_serves_every_damping():
    values = torch.logspace(1, -4, 40).double()
    C = rotated(values)
    found = stochastic_spectrum(lambda V: C @ V, 40, probes=60, steps=40)
    measure = found.measure
    assert measure.trace == pytest.approx(float(values.sum()), rel=0.05)
    for damping in (0.01, 0.3):
        exact, estimate = effective_dimension(values, damping), found.effective_dimension(damping, 0.999)
        assert estimate.low < exact < estimate.high
        assert effective_dimension(measure.values, damping, measure.counts) == pytest.approx(estimate.value, rel=1e-6)
    assert damping_for(measure.values, 12.0, measure.counts) == pytest.approx(damping_for(values, 12.0), rel=0.2)


def test_a_curvature_with_a_kernel_has_no_dimension_beyond_its_rank():
    C = torch.diag(torch.cat([torch.ones(5), torch.zeros(35)]).double())
    found = stochastic_effective_dimension(lambda V: C @ V, 40, 1e-6, probes=4, steps=10)
    assert found.low == pytest.approx(5.0, rel=1e-4)  # a diagonal matrix has no spread over sign vectors
    assert found.high == pytest.approx(5.0, rel=1e-4)


def test_a_curvature_that_is_zero_has_no_dimension():
    found = stochastic_effective_dimension(torch.zeros_like, 3, 0.1)
    assert found.low == found.value == 0
    assert found.high == pytest.approx(0, abs=1e-8)


def test_what_has_no_interval_is_refused():
    C = torch.eye(3, dtype=torch.float64)
    with pytest.raises(RefluenceError, match="at least 2 probes, not 1"):
        stochastic_spectrum(lambda V: C @ V, 3, probes=1)
    with pytest.raises(RefluenceError, match="above 1e-09"):
        stochastic_effective_dimension(lambda V: C @ V, 3, 0.0)


def population(n: int, d: int, seed: int, heavy: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(n, d, dtype=torch.float64, generator=generator) * torch.logspace(0, -2, d).double()
    return G * torch.randn(n, 1, dtype=torch.float64, generator=generator).abs() ** 2 if heavy else G


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_intervals_of_a_subsample_cover_the_dimension_of_all_rows(heavy, damping):
    n, N = 400, 120
    G = population(n, 60, 0, heavy)
    exact = effective_dimension(torch.linalg.eigvalsh(G.T @ G / n), damping)
    values, covered = [], 0
    for seed in range(100):
        rows = G[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:N]]
        found = subsampled_effective_dimension(rows @ rows.T / N, damping, n)
        covered += found.low <= exact <= found.high
        values.append(found.value)
    assert covered >= 95
    # Rows of very unequal norms are no random compression: the value is then too low.
    assert 0.8 * exact < np.mean(values) < exact if heavy else np.mean(values) == pytest.approx(exact, rel=0.02)


def test_its_leave_one_out_quantities_are_those_of_a_loop():
    """Low and high ends at confidence → 0 are the dimension of the sample and the mixed held-out mean."""
    N, n, damping = 25, 60, 0.05
    G = population(N, 10, 1, heavy=True)
    eye = torch.eye(10, dtype=torch.float64)
    held_out, deleted = [], []
    for i in range(N):
        others = torch.cat([G[:i], G[i + 1 :]])
        C = others.T @ others / (N - 1)
        held_out.append(float(G[i] @ torch.linalg.solve(C + damping * eye, G[i])))
        deleted.append(effective_dimension(torch.linalg.eigvalsh(C).clamp(min=0), damping))
    inside = effective_dimension(torch.linalg.eigvalsh(G.T @ G / N).clamp(min=0), damping)
    narrow = subsampled_effective_dimension(G @ G.T / N, damping, n, confidence=1e-12)
    assert narrow.low == pytest.approx(inside, rel=1e-9)
    assert narrow.high == pytest.approx(N / n * inside + (1 - N / n) * np.mean(held_out), rel=1e-9)
    wide = subsampled_effective_dimension(G @ G.T / N, damping, n, confidence=0.9)
    jackknife = np.sqrt((N - 1) / N * ((np.array(deleted) - np.mean(deleted)) ** 2).sum() * (1 - N / n))
    assert wide.low == pytest.approx(inside - 1.710882 * jackknife, rel=1e-5)


def test_a_sample_of_all_rows_is_exact():
    G = population(40, 12, 2, heavy=False)
    exact = effective_dimension(torch.linalg.eigvalsh(G.T @ G / 40), 0.1)
    found = subsampled_effective_dimension(G @ G.T / 40, 0.1, population=40)
    assert (found.low, found.value, found.high) == pytest.approx((exact, exact, exact), rel=1e-9)


def test_too_few_rows_are_refused_with_a_remedy():
    G = torch.eye(4, 50, dtype=torch.float64)
    with pytest.raises(RefluenceError, match="4 rows are too few for d_λ at damping 1e-06: draw at least 8"):
        subsampled_effective_dimension(G @ G.T / 4, 1e-6)
    with pytest.raises(RefluenceError, match="population of no fewer, not 4 rows of 3"):
        subsampled_effective_dimension(G @ G.T / 4, 1.0, population=3)
