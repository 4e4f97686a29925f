"""Losses held to the model: a minimum where the model is, and the response to an example's loss beside it."""

import pytest
import torch
from torch import nn

import refluence as rf
from refluence.errors import DataError
from refluence.evaluation.held_sums import HeldSums
from refluence.evaluation.sums import flat_parameters
from support.problems import close


def problem(**options):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    train = (torch.randn(17, 4, generator=generator).double(), torch.randint(0, 3, (17,), generator=generator))
    return rf.Task(model, **options), train


@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_the_model_is_a_minimum_of_the_held_objective_whatever_it_was_trained_to(l2):
    task, train = problem(l2=l2)
    sums = HeldSums(task, train, dict.fromkeys(task.parameter_names(), 0.1))
    theta = flat_parameters(task.model, task.parameter_names())
    around = theta + 0.05 * torch.randn(8, len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values, gradients = sums.of_all(torch.cat([theta[None], around]))
    objective = values / sums.n + l2 / 2 * torch.cat([theta[None], around]).square().sum(dim=1)
    assert float((gradients[0] / sums.n + l2 * theta).abs().max()) < 1e-12
    assert bool((objective[1:] > objective[0]).all())


def test_its_second_derivative_is_the_ggn_with_the_damping():
    task, train = problem()
    sums = HeldSums(task, train, dict.fromkeys(task.parameter_names(), 0.1))
    theta = flat_parameters(task.model, task.parameter_names())
    step = 1e-5
    moves = step * torch.eye(len(theta), dtype=torch.float64)
    difference = (sums.of_all(theta + moves)[1] - sums.of_all(theta - moves)[1]) / (2 * step * sums.n)
    fitted = rf.Influence(task, "ggn", rf.solvers.Dense(), 0.1, progress=False).fit(train)
    [ggn] = fitted._fitted().curvature.dense().values()
    close(difference, ggn + 0.1 * torch.eye(len(theta)).double(), 1e-6)


def test_what_is_left_out_is_the_loss():
    task, train = problem()
    sums = HeldSums(task, train, dict.fromkeys(task.parameter_names(), 0.1))
    theta = flat_parameters(task.model, task.parameter_names())
    values, _ = sums.of_sets(theta[None].expand(2, -1), [[3, 5], []])
    losses = task.losses(task.model(train[0]), train).detach()
    close(values, torch.stack([losses[[3, 5]].sum(), losses.new_zeros(())]), 1e-12)


def test_an_output_that_is_no_tensor_is_refused():
    task, train = problem(
        forward=lambda model, batch: {"logits": model(batch[0])},
        loss=lambda output, batch: nn.functional.cross_entropy(output["logits"], batch[1], reduction="none"),
    )
    with pytest.raises(DataError, match="needs a tensor"):
        HeldSums(task, train, dict.fromkeys(task.parameter_names(), 0.1))
