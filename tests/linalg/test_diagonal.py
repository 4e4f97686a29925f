"""Hutchinson's diagonal: exact for diagonal maps, unbiased with honest errors for others."""

import torch

from refluence.linalg import hutchinson_diagonal

CPU = torch.device("cpu")


def estimate(A, probes, seed=0, dtype=torch.float64):
    return hutchinson_diagonal(lambda v: A.to(dtype) @ v, len(A), probes, seed, dtype, CPU)


def test_exact_for_a_diagonal_map():
    values = torch.linspace(-1, 5, 70, dtype=torch.float64)
    for probes in (1, 3, 40):
        found, errors = estimate(torch.diag(values), probes)
        torch.testing.assert_close(found, values)
        assert (errors <= 1e-12).all() if probes > 1 else torch.isinf(errors).all()


def test_unbiased_with_its_known_variance():
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(100, 30, generator=generator, dtype=torch.float64)
    A, probes = factor @ factor.T / 30, 4000
    found, errors = estimate(A, probes)
    expected = ((A.square().sum(dim=1) - A.diagonal().square()) / probes).sqrt()
    torch.testing.assert_close(errors, expected, rtol=0.1, atol=0)
    z = (found - A.diagonal()) / expected
    assert z.abs().max() < 5
    assert abs(float(z.square().mean()) - 1) < 0.4


def test_depends_on_the_seed_alone():
    A = torch.randn(50, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(estimate(A, 40)[0], estimate(A, 40)[0])
    assert not torch.equal(estimate(A, 40)[0], estimate(A, 40, seed=1)[0])
    torch.testing.assert_close(estimate(A, 40, dtype=torch.float32)[0], estimate(A, 40)[0], rtol=1e-4, atol=1e-4)
