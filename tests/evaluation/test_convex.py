"""Exact leave-one-out of convex models, against minimisers that share nothing with it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import solve
from scipy.optimize import minimize as scipy_minimize
from scipy.special import log_softmax
from torch import nn

import refluence as rf
from refluence.errors import DataError, SolverError
from refluence.evaluation.convex import leave_one_out, minimise
from refluence.evaluation.newton import newton_removal, newton_steps
from refluence.evaluation.sums import flat_parameters
from refluence.zoo import load_dataset

L2 = 1e-3


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def task() -> rf.Task:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return rf.Task(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), l2=L2)


def softmax_regression(x: np.ndarray, y: np.ndarray, l2: float, start: np.ndarray) -> np.ndarray:
    """(weight (c, p), bias (c)) flat, by damped Newton steps with an explicit Hessian, to the end of float64."""
    ones = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    c = int(y.max()) + 1
    wanted, theta = np.eye(c)[y], start.copy()

    def folded(flat: np.ndarray) -> np.ndarray:
        return np.concatenate([flat[: c * x.shape[1]].reshape(c, -1), flat[c * x.shape[1] :, None]], axis=1)

    def unfolded(matrix: np.ndarray) -> np.ndarray:
        return np.concatenate([matrix[:, :-1].ravel(), matrix[:, -1]])

    for _ in range(30):
        p = np.exp(log_softmax(ones @ folded(theta).T, axis=1))
        gradient = (p - wanted).T @ ones / len(x) + l2 * folded(theta)
        hessian = np.zeros((c, ones.shape[1], c, ones.shape[1]))
        for a in range(c):
            for b in range(a + 1):
                hessian[a, :, b, :] = ones.T @ (ones * (p[:, a] * ((a == b) - p[:, b]))[:, None]) / len(x)
                hessian[b, :, a, :] = hessian[a, :, b, :]
        size = c * ones.shape[1]
        step = solve(hessian.reshape(size, size) + l2 * np.eye(size), gradient.ravel(), assume_a="pos")
        theta -= unfolded(step.reshape(c, -1))
        if np.abs(step).max() < 1e-13:
            return theta
    raise AssertionError("the reference did not converge")


def losses(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    weight, bias = theta[: 10 * x.shape[1]].reshape(10, -1), theta[10 * x.shape[1] :]
    return -log_softmax(x @ weight.T + bias, axis=1)[np.arange(len(y)), y]


def as_numpy(pair) -> tuple[np.ndarray, np.ndarray]:
    return pair[0].flatten(1).double().numpy(), pair[1].numpy()


def test_digits_against_independent_refits(digits, task):
    rows = [3, 719, [5, 100, 1000]]
    truth = leave_one_out(task, digits.train, digits.test, rows, tolerance=1e-11, progress=False)
    (x, y), (x_test, y_test) = as_numpy(digits.train), as_numpy(digits.test)
    everything = softmax_regression(x, y, L2, np.zeros(650))
    before = losses(everything, x_test, y_test)
    for i, removed in enumerate(rows):
        left = np.setdiff1d(np.arange(len(x)), removed)
        expected = losses(softmax_regression(x[left], y[left], L2, everything), x_test, y_test)
        np.testing.assert_allclose(truth.values()[i].numpy(), expected, rtol=0, atol=1e-9)
        np.testing.assert_allclose(truth.changes()[i].numpy(), expected - before, rtol=0, atol=1e-9)
    assert truth.manifest["converged"] == [True] * len(rows)
    assert max(truth.manifest["gradient_norms"]) <= 1e-11
    assert truth.masks.sum(dim=1).tolist() == [1436, 1436, 1434]


def small() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(30, 4, generator=generator)
    return x, (x[:, 0] + 2 * torch.randn(30, generator=generator)).argsort().argsort() % 3


def small_task(l2: float = 0.01, **options) -> rf.Task:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return rf.Task(nn.Linear(4, 3), l2=l2, **options)


def test_minimum_against_scipy():
    x, y = small()
    model = minimise(small_task(), (x, y), progress=False)
    found = softmax_regression(x.double().numpy(), y.numpy(), 0.01, np.zeros(15))
    assert model.weight.dtype == torch.float64
    mine = torch.cat([model.weight.detach().flatten(), model.bias.detach()])
    np.testing.assert_allclose(mine.numpy(), found, rtol=0, atol=1e-7)


def test_minimum_over_some_of_the_parameters():
    x, y = small()
    task = small_task(parameters="weight")
    bias = task.model.bias.detach().double()
    model = minimise(task, (x, y), progress=False)
    assert torch.equal(model.bias.detach(), bias)
    value = task.losses(model(x.double()), (x, y)).mean() + task.l2 / 2 * model.weight.square().sum()
    [gradient] = torch.autograd.grad(value, [model.weight])
    assert float(gradient.norm()) <= 1e-8


def test_ridge_regression_has_its_closed_form():
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(20, 3, generator=generator), torch.randn(20, 1, generator=generator)
    task = rf.Task(nn.Linear(3, 1, bias=False), loss="mse", l2=0.3)
    truth = leave_one_out(task, (x, y), (x[:5], y[:5]), tolerance=1e-12, progress=False)
    X, Y = x.double().numpy(), y.double().numpy()[:, 0]
    for i in range(20):
        left = np.arange(20) != i
        ridge = X[left].T @ X[left] * 2 / 19 + 0.3 * np.eye(3)
        theta = np.linalg.solve(ridge, X[left].T @ Y[left] * 2 / 19)
        np.testing.assert_allclose(truth.values()[i].numpy(), (X[:5] @ theta - Y[:5]) ** 2, rtol=0, atol=1e-11)


class Positions(nn.Module):
    """Linear in its parameters and no single layer: one layer at every position, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.unflatten(1, (2, 2))).sum(dim=1)


def test_convex_models_of_another_form():
    x, y = small()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        task = rf.Task(Positions(), l2=0.05)
    truth = leave_one_out(task, (x, y), (x, y), [0, [1, 2]], tolerance=1e-10, progress=False)
    summed = np.concatenate([x.double().numpy().reshape(30, 2, 2).sum(1), np.full((30, 1), 2.0)], axis=1)

    def refitted(left: np.ndarray) -> np.ndarray:
        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            logits = summed[left] @ flat.reshape(3, 3)
            log_p = log_softmax(logits, axis=1)
            wanted = np.eye(3)[y[left]]
            value = -(log_p * wanted).sum() / len(left) + 0.025 * flat @ flat
            return value, (summed[left].T @ (np.exp(log_p) - wanted) / len(left)).ravel() + 0.05 * flat

        found = scipy_minimize(objective, np.zeros(9), jac=True, method="BFGS", options={"gtol": 1e-10}).x
        return -log_softmax(summed @ found.reshape(3, 3), axis=1)[np.arange(30), y]

    for i, removed in enumerate([[0], [1, 2]]):
        expected = refitted(np.setdiff1d(np.arange(30), removed))
        np.testing.assert_allclose(truth.values()[i].numpy(), expected, rtol=0, atol=1e-7)


def test_without_l2_where_a_minimum_exists():
    x, y = small()
    model = minimise(small_task(l2=0.0), (x, y), progress=False)
    gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x.double()), y), model.parameters())
    assert torch.cat([g.flatten() for g in gradients]).norm() <= 1e-8


def test_separable_classes_without_l2_have_no_minimum():
    x, _ = small()
    with pytest.raises(SolverError, match=r"no minimum: with l2 = 0 .* give the task an l2 > 0"):
        minimise(small_task(l2=0.0), (x, (x[:, 0] > 0).long()), progress=False)


def test_a_network_is_sent_to_retraining():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(SolverError, match=r"not convex: .* rf\.evaluation\.retrain"):
        minimise(rf.Task(network, l2=1e-3), small(), progress=False)


def test_a_loss_that_is_not_convex_is_sent_to_retraining():
    task = small_task(loss=lambda output, batch: torch.cos(3 * output).sum(dim=1))
    with pytest.raises(SolverError, match=r"rf\.evaluation\.retrain"):
        minimise(task, small(), progress=False)


def test_starts_and_a_given_inverse_change_nothing_but_the_work(task, digits):
    rows = [0, 7, 9]
    plain = leave_one_out(task, digits.train, digits.test, rows, tolerance=1e-11, progress=False)
    best = rf.Task(minimise(task, digits.train, tolerance=1e-11, progress=False), l2=L2)
    influence = rf.Influence(best, "ggn", rf.solvers.Dense(), 0.0, dtype=torch.float64, progress=False)
    influence.fit(digits.train)
    own = flat_parameters(best.model, best.parameter_names())
    near = own + newton_steps(influence, rows)
    quick = leave_one_out(
        best, digits.train, digits.test, rows, start=near, influence=influence, tolerance=1e-11, progress=False
    )
    torch.testing.assert_close(quick.changes(), plain.changes(), rtol=0, atol=1e-9)
    assert sum(quick.manifest["iterations"]) < sum(plain.manifest["iterations"])


def test_goes_on_after_a_kill_and_with_more_rows(tmp_path, monkeypatch):
    data, task = small(), small_task()
    monkeypatch.setattr("refluence.evaluation.refitting.MOST_TOGETHER", 4)
    whole = leave_one_out(task, data, data, progress=False)
    finished: list[int] = []

    import refluence.evaluation.convex as convex

    write = convex.write_tensors

    def killed(path: Path, tensors: object, metadata: object) -> None:
        if len(finished) == 3:
            raise KeyboardInterrupt
        finished.append(1)
        write(path, tensors, metadata)

    monkeypatch.setattr(convex, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        leave_one_out(task, data, data, range(20), path=tmp_path, progress=False)
    monkeypatch.setattr(convex, "write_tensors", write)
    refitted: list[int] = []
    refits = convex.refits

    def counted(sums, removals, *rest):
        refitted.append(len(removals))
        return refits(sums, removals, *rest)

    monkeypatch.setattr(convex, "refits", counted)
    resumed = leave_one_out(task, data, data, path=tmp_path, progress=False)
    assert refitted == [30 - 2 * 4]
    torch.testing.assert_close(resumed.changes(), whole.changes(), rtol=0, atol=1e-7)
    again = leave_one_out(task, data, data, path=tmp_path, progress=False)
    assert len(refitted) == 1
    assert torch.equal(again.values(), resumed.values())


def test_a_folder_of_other_refits_is_refused(tmp_path):
    data = small()
    leave_one_out(small_task(), data, data, [1], path=tmp_path, progress=False)
    changed = (data[0].clone(), data[1])
    changed[0][15] += 1
    for task, train in ((small_task(l2=0.02), data), (small_task(), changed)):
        with pytest.raises(DataError, match="holds refits of another"):
            leave_one_out(task, train, data, [1], path=tmp_path, progress=False)


def test_what_does_not_converge_is_said():
    data = small()
    with pytest.warns(UserWarning, match=r"of 2 removals did not reach"):
        truth = leave_one_out(small_task(), data, data, [1, [2, 3]], maxiter=1, tolerance=1e-12, progress=False)
    assert False in truth.manifest["converged"]


def test_an_influence_on_other_data_is_refused():
    data = small()
    influence = rf.Influence(small_task(), "ggn", rf.solvers.Dense(), 0.0, progress=False).fit(
        (data[0][:9], data[1][:9])
    )
    with pytest.raises(DataError, match="fitted on 9 examples"):
        leave_one_out(small_task(), data, data, [1], influence=influence, progress=False)


@pytest.mark.data
def test_mnist_with_its_empty_pixels():
    """1,000 images of 14×14: Newton-corrected removal and the refits agree to a hundredth of the changes."""
    if not (Path(os.environ.get("REFLUENCE_DATA", "")) / "mnist").is_dir():
        pytest.skip("MNIST is not in $REFLUENCE_DATA")
    split = load_dataset("mnist", n_train=1000, n_test=50)

    def pixels(images: torch.Tensor) -> torch.Tensor:
        return (images[:, :, ::2, ::2] * split.image.std + split.image.mean).clamp(min=0)

    train, test = ((pixels(images), labels) for images, labels in (split.train, split.test))
    assert int((train[0] == 0).all(dim=0).sum()) > 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        task = rf.Task(nn.Sequential(nn.Flatten(), nn.Linear(196, 10, bias=False)), l2=0.1)
    truth = leave_one_out(task, train, test, range(10), progress=False)
    assert max(truth.manifest["gradient_norms"]) <= 1e-8
    best = rf.Task(minimise(task, train, progress=False), l2=0.1)
    influence = rf.Influence(best, "ggn", rf.solvers.Dense(), 0.0, dtype=torch.float64, progress=False).fit(train)
    predicted = newton_removal(influence, test, range(10), progress=False).changes.T
    assert float((predicted - truth.changes()).norm()) < 0.01 * float(truth.changes().norm())
