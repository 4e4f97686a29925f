"""The Fisher of sampled labels: the same labels on every split, and standard errors that mean what they say."""

import numpy as np
import pytest
import torch
from torch import nn

import refluence as rf
from refluence.solvers import Gram
from support.least_squares import expected_scores
from support.problems import K, close


def sampling(samples, seed, batch_size=256, damping=0.05, n=40):
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 3, generator=generator))
        model.bias.zero_()
    x = torch.randn(n + K, 3, generator=generator).double()
    y = torch.randint(3, (n + K,), generator=generator)
    train, test = (x[:n], y[:n]), (x[n:], y[n:])
    influence = rf.Influence(
        rf.Task(model), "mc_fisher", Gram(), damping, samples=samples, seed=seed, batch_size=batch_size, progress=False
    )
    return model, train, test, influence.fit(train).score(test)


def test_sampled_labels_do_not_depend_on_the_batches():
    expected = sampling(2, 7, 16)[3]
    for batch_size in (1, 7, 40):
        scores = sampling(2, 7, batch_size)[3]
        close(scores.values, expected.values, 1e-10)
        close(scores.error, expected.error, 1e-10)
    assert not torch.allclose(sampling(2, 8)[3].values, expected.values)


@pytest.mark.parametrize(("n", "samples"), [(150, 2), (40, 8)])
def test_the_standard_errors_cover_the_true_fisher_as_often_as_they_claim(n, samples):
    """68.3 % within one, 95.4 % within two, over entries and seeds; entries share samples, hence the ± 7 points."""
    inside = {1: [], 2: []}
    for seed in range(25):
        model, train, test, scores = sampling(samples, seed, n=n)
        if seed == 0:
            exact = expected_scores(model, train, test, "true_fisher", 0.05, "cross_entropy")[0]
        for k, found in inside.items():
            found.append(float(((scores.values - exact).abs() <= k * scores.error).double().mean()))
    assert abs(np.mean(inside[1]) - 0.683) < 0.07
    assert abs(np.mean(inside[2]) - 0.954) < 0.05


def test_the_error_of_sampling_falls_with_the_root_of_the_samples():
    model, train, test, _ = sampling(1, 0)
    exact = expected_scores(model, train, test, "true_fisher", 0.05, "cross_entropy")[0]
    errors = {}
    for samples in (4, 16, 48):
        differences = [(sampling(samples, seed)[3].values - exact).square().mean() for seed in range(6)]
        errors[samples] = float(torch.stack(differences).mean().sqrt())
    assert 1.5 < errors[4] / errors[16] < 2.7
    assert 1.3 < errors[16] / errors[48] < 2.3  # √3


def test_one_sample_has_no_standard_error():
    assert sampling(1, 0)[3].error is None
