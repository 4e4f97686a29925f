"""Refits without examples are the minimisers of what is left, whichever way the sums of losses are made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize as scipy_minimize
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import refluence as rf
from refluence.errors import DataError
from refluence.evaluation.linear_sums import LinearSums, sums_of
from refluence.evaluation.newton import inverse_products
from refluence.evaluation.optimum import task_at
from refluence.evaluation.refitting import Refit, refit_without
from refluence.evaluation.sums import ModelSums, flat_parameters, float64_copy
from refluence.execution import Execution

N, WIDTH, CLASSES = 40, 5, 3
REMOVALS = [[3], [], [0, 7, 12], [39], list(range(15)), [8]]


def classification() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with a column that is zero everywhere, and classes that overlap."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(N, WIDTH, generator=generator)
    x[:, 2] = 0.0
    return x, (x[:, 0] + torch.randn(N, generator=generator)).argsort().argsort() % CLASSES


def regression(outputs: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    x, _ = classification()
    noise = torch.randn(N, outputs, generator=torch.Generator().manual_seed(6))
    return x, x[:, :outputs] + noise


def binary() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = classification()
    return x, (y > 0).float()


class Product(nn.Module):
    """x @ W + b with parameters of its own, the bias first."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.W = nn.Parameter(torch.randn(CLASSES)), nn.Parameter(torch.randn(WIDTH, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.W + self.b


class Single(nn.Module):
    """One output without a dimension of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).squeeze(1)


def frozen_features() -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    model[0].requires_grad_(False)
    return model


def hinge(output: torch.Tensor, batch: tuple) -> torch.Tensor:
    """A loss of the user's that looks at the inputs too."""
    return torch.nn.functional.softplus(-output[:, 0]) + 0.1 * (output**2).sum(1) * batch[0].abs().mean(1)


LINEAR = {
    "softmax regression": (lambda: nn.Linear(WIDTH, CLASSES), "cross_entropy", classification),
    "without bias": (lambda: nn.Linear(WIDTH, CLASSES, bias=False), "cross_entropy", classification),
    "logistic regression": (Single, "binary_cross_entropy", binary),
    "linear regression": (lambda: nn.Linear(WIDTH, 2), "mse", regression),
    "a product of the user's": (Product, "cross_entropy", classification),
    "a head on frozen features": (frozen_features, "cross_entropy", classification),
    "a loss of the user's": (lambda: nn.Linear(WIDTH, CLASSES), hinge, classification),
    "flattened images": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, CLASSES)),
        "cross_entropy",
        lambda: (classification()[0][:, None, :, None], classification()[1]),
    ),
}


class Twice(nn.Module):
    """One layer used at two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.layer(x.flip(1))


class Bent(nn.Module):
    """A layer whose output is changed afterwards, where it is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.leaky_relu(self.layer(x), 0.5)


class Scaled(Bent):
    """A layer whose output is multiplied by a number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)


class Sometimes(Bent):
    """A layer that is bent for some inputs only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = self.layer(x)
        return torch.where(x[:, :1] > 1.0, outputs.relu(), outputs)


OTHERS = {
    "two layers": lambda: nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, CLASSES)),
    "one layer used twice": Twice,
    "a layer that is bent": Bent,
    "a layer that is scaled": Scaled,
    "a layer that is bent sometimes": Sometimes,
}


def built(make) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return make()


def linear_task(name: str, l2: float = 0.05) -> tuple[rf.Task, tuple]:
    make, loss, data = LINEAR[name]
    return rf.Task(built(make), loss=loss, l2=l2), data()


def newton_step(task: rf.Task, data: tuple, curvature: str = "ggn"):
    """Rows ↦ (C + l2)⁻¹ rows at the task's own parameters."""
    influence = rf.Influence(task, curvature, rf.solvers.Dense(), damping=0.0, dtype=torch.float64, progress=False).fit(
        data
    )
    return lambda rows: inverse_products(influence, rows)


def gradient_of(task: rf.Task, data: tuple, removed: list[int], theta: torch.Tensor) -> torch.Tensor:
    """By autograd on the examples that are left."""
    left = [i for i in range(len(data[0])) if i not in removed]
    model = task_at(task, theta).model
    batch = tuple(x[left].double() if x.is_floating_point() else x[left] for x in data)
    chosen = [dict(model.named_parameters())[name].requires_grad_() for name in task.parameter_names()]
    value = task.losses(task.output(model, batch), batch).mean()
    value = value + task.l2 / 2 * sum(p.square().sum() for p in chosen)
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, chosen)])


@pytest.mark.parametrize("name", LINEAR)
def test_one_product_for_all_models_gives_the_sums_of_the_general_way(name):
    task, data = linear_task(name)
    fast = sums_of(task, data, Execution())
    assert isinstance(fast, LinearSums)
    general = ModelSums(task, float64_copy(task.model), data)
    thetas = torch.randn(len(REMOVALS), fast.d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for ours, reference in (
        (fast.of_all(thetas), general.of_all(thetas)),
        (fast.of_sets(thetas, REMOVALS), general.of_sets(thetas, REMOVALS)),
    ):
        for mine, theirs in zip(ours, reference, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_take_the_general_way(name):
    assert isinstance(sums_of(rf.Task(built(OTHERS[name])), classification(), Execution()), ModelSums)


def test_inputs_that_do_not_fit_the_memory_are_streamed():
    task, data = linear_task("softmax regression")
    assert isinstance(sums_of(task, data, Execution("100B")), ModelSums)


@pytest.mark.parametrize("name", ["two layers", "one layer used twice", "a layer that is bent sometimes"])
def test_sums_are_those_of_autograd_over_uneven_batches(name):
    task = rf.Task(built(OTHERS[name]))
    data = classification()
    sums = ModelSums(task, float64_copy(task.model), DataLoader(TensorDataset(*data), batch_size=7))
    thetas = torch.randn(len(REMOVALS), sums.d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    everything, gradients = sums.of_all(thetas)
    removed, less = sums.of_sets(thetas, REMOVALS)
    assert float(removed[1]) == 0.0
    for i, rows in enumerate(REMOVALS):
        mine = (gradients[i] - less[i]) / (N - len(rows))
        torch.testing.assert_close(mine, gradient_of(task, data, rows, thetas[i]), rtol=1e-10, atol=1e-12)
    assert bool((everything > removed).all())


class Looping(nn.Module):
    """A model that torch.func cannot vectorise: its control flow depends on its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = self.layer(x).tanh()
        return outputs if self.layer.weight.sum().item() > 1e9 else outputs + 1


def test_models_that_cannot_be_vectorised_are_taken_one_by_one():
    task, data = rf.Task(built(Looping)), classification()
    sums = ModelSums(task, float64_copy(task.model), data)
    theta = torch.randn(2, sums.d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = sums.of_all(theta)[1] / N
    for i in range(2):
        torch.testing.assert_close(gradients[i], gradient_of(task, data, [], theta[i]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LINEAR)
def test_refits_have_no_gradient_on_what_is_left(name):
    task, data = linear_task(name)
    refit = refit_without(task, data, REMOVALS, newton_step(task, data), tolerance=1e-10, progress=False)
    assert bool(refit.converged.all())
    for i, rows in enumerate(REMOVALS):
        gradient = gradient_of(task, data, rows, refit.parameters[i])
        assert float(gradient.norm()) <= 2e-10
        assert float(refit.gradient_norms[i]) == pytest.approx(float(gradient.norm()), abs=1e-14)


def test_refits_are_those_of_an_independent_minimiser():
    task, data = linear_task("softmax regression")
    refit = refit_without(task, data, REMOVALS, newton_step(task, data), tolerance=1e-11, progress=False)
    x = torch.cat([data[0].double(), torch.ones(N, 1, dtype=torch.float64)], dim=1).numpy()
    one_hot = np.eye(CLASSES)[data[1]]

    for i, rows in enumerate(REMOVALS):
        left = np.setdiff1d(np.arange(N), rows)

        def objective(theta, left=left):
            weight = np.concatenate([theta[: WIDTH * CLASSES].reshape(CLASSES, -1).T, theta[None, WIDTH * CLASSES :]])
            logits = x[left] @ weight
            log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            slope = x[left].T @ (np.exp(log_p) - one_hot[left]) / len(left)
            value = -(log_p * one_hot[left]).sum() / len(left) + task.l2 / 2 * theta @ theta
            return value, np.concatenate([slope[:-1].T.ravel(), slope[-1]]) + task.l2 * theta

        found = scipy_minimize(
            objective, np.zeros(refit.parameters.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-10}
        ).x
        np.testing.assert_allclose(refit.parameters[i].numpy(), found, rtol=0, atol=1e-8)


def test_a_group_at_a_time_gives_the_same(monkeypatch):
    task, data = linear_task("softmax regression")
    step = newton_step(task, data)
    whole = refit_without(task, data, REMOVALS, step, progress=False)
    monkeypatch.setattr("refluence.evaluation.refitting.MOST_TOGETHER", 2)
    parts = refit_without(task, data, REMOVALS, step, progress=False)
    torch.testing.assert_close(parts.parameters, whole.parameters, rtol=1e-10, atol=1e-12)
    assert torch.equal(parts.iterations, whole.iterations)


def test_a_start_for_each_and_one_for_all():
    task, data = linear_task("softmax regression")
    step = newton_step(task, data)
    reached = refit_without(task, data, REMOVALS, step, tolerance=1e-11, progress=False).parameters
    again = refit_without(task, data, REMOVALS, step, start=reached, progress=False)
    assert again.iterations.tolist() == [0] * len(REMOVALS)
    assert torch.equal(again.parameters, reached)
    shared = refit_without(task, data, REMOVALS, step, start=reached[1], tolerance=1e-11, progress=False)
    torch.testing.assert_close(shared.parameters, reached, rtol=0, atol=1e-9)


@settings(max_examples=5, deadline=None)
@given(scale=st.floats(0.02, 50.0), seed=st.integers(0, 99))
def test_a_poor_step_still_reaches_the_minimum(scale, seed):
    """Steps many times too long or too short, and bent, from afar."""
    task, data = linear_task("softmax regression")
    good = newton_step(task, data)
    generator = torch.Generator().manual_seed(seed)
    d = len(flat_parameters(task.model, task.parameter_names()))
    stretch = torch.rand(d, generator=generator, dtype=torch.float64) + 0.5
    start = 3 * torch.randn(d, generator=generator, dtype=torch.float64)
    refit = refit_without(
        task,
        data,
        [[], [4, 5]],
        lambda rows: scale * stretch * good(stretch * rows),
        start=start,
        tolerance=1e-9,
        maxiter=300,
        progress=False,
    )
    assert bool(refit.converged.all())


def test_a_network_is_refitted_from_a_warm_start_with_honest_norms():
    """Not convex: whatever is reached, the norm is that of the gradient there, and no objective has risen."""
    data, removals = classification(), [[3], [], [0, 7, 12]]
    untrained = rf.Task(built(OTHERS["two layers"]), l2=0.02)
    trained = refit_without(untrained, data, [[]], lambda rows: rows, tolerance=1e-4, maxiter=500, progress=False)
    assert bool(trained.converged.all())
    task = task_at(untrained, trained.parameters[0])
    step = newton_step(task, data, "hessian")
    few = refit_without(task, data, removals, step, tolerance=1e-9, maxiter=1, progress=False)
    many = refit_without(task, data, removals, step, tolerance=1e-9, maxiter=300, progress=False)
    assert few.converged.tolist() == [False] * 3
    assert few.iterations.tolist() == [1] * 3
    assert many.converged.tolist() == [True] * 3
    sums = ModelSums(task, float64_copy(task.model), data)
    start = flat_parameters(task.model, task.parameter_names()).expand(len(removals), -1)
    counts = torch.tensor([N - len(rows) for rows in removals], dtype=torch.float64)
    values = []
    for thetas in (start, few.parameters, many.parameters):
        kept = sums.of_all(thetas)[0] - sums.of_sets(thetas, removals)[0]
        values.append(kept / counts + task.l2 / 2 * thetas.square().sum(dim=1))
    assert bool((values[1] < values[0]).all())
    assert bool((values[2] < values[1]).all())
    for refit in (few, many):
        for i, rows in enumerate(removals):
            gradient = gradient_of(task, data, rows, refit.parameters[i])
            assert float(refit.gradient_norms[i]) == pytest.approx(float(gradient.norm()), rel=1e-6, abs=1e-13)


def test_a_step_uphill_is_replaced():
    """An indefinite inverse gives directions along which the objective rises."""
    task, data = linear_task("softmax regression")
    refit = refit_without(task, data, [[1]], lambda rows: -rows, maxiter=2000, tolerance=1e-6, progress=False)
    assert bool(refit.converged.all())


def test_a_step_that_is_no_number_does_no_harm():
    task, data = linear_task("softmax regression")
    refit = refit_without(task, data, [[1], []], lambda rows: rows * torch.nan, maxiter=5, progress=False)
    assert bool(torch.isfinite(refit.parameters).all())
    start = flat_parameters(task.model, task.parameter_names())
    for i, rows in enumerate([[1], []]):
        assert float(refit.gradient_norms[i]) < float(gradient_of(task, data, rows, start).norm())


def test_a_tolerance_below_rounding_ends():
    task, data = linear_task("softmax regression")
    refit = refit_without(
        task, data, [[1], []], newton_step(task, data), tolerance=1e-30, maxiter=10_000, progress=False
    )
    assert not bool(refit.converged.any())
    assert int(refit.iterations.max()) < 200
    assert float(refit.gradient_norms.max()) < 1e-14


def test_no_removals_give_nothing():
    task, data = linear_task("softmax regression")
    refit = refit_without(task, data, [], lambda rows: rows, progress=False)
    assert refit.parameters.shape == (0, CLASSES * (WIDTH + 1))
    assert isinstance(refit, Refit)


def test_nothing_of_the_users_changes():
    task, data = rf.Task(built(OTHERS["two layers"]).train(), l2=0.1), classification()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    state = torch.get_rng_state()
    refit_without(task, data, [[1]], lambda rows: rows, maxiter=2, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert task.model.training
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == torch.float32
    assert all(parameter.grad is None for parameter in task.model.parameters())


@pytest.mark.parametrize(
    ("removals", "message"),
    [
        ([[3], [N]], f"removal 1 has row {N}, but the train examples are 0 to {N - 1}"),
        ([[2, 2]], "removal 0 has a row twice"),
        ([list(range(N))], "removal 0 leaves no example"),
    ],
)
def test_impossible_removals_are_refused(removals, message):
    task, data = linear_task("softmax regression")
    with pytest.raises(DataError, match=message):
        refit_without(task, data, removals, lambda rows: rows, progress=False)


def test_a_start_of_another_length_is_refused():
    task, data = linear_task("softmax regression")
    with pytest.raises(DataError, match=r"start has shape \(4,\); it must be \(18,\) or \(2, 18\)"):
        refit_without(task, data, [[1], [2]], lambda rows: rows, start=torch.zeros(4, dtype=torch.float64))
