"""Real data: exact scores of a trained network, and predicted removals against real refits."""

import os

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

import refluence as rf
from refluence.zoo import load_dataset
from support.reference import loop_gradients, scores


def per_example(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


# ---------------------------------------------------------------- MNIST


@pytest.fixture(scope="module")
def mnist():
    """(train, test): 300 and 20 images averaged down to 7×7, in float64."""
    data = load_dataset("mnist", n_train=300, n_test=20)
    return tuple((F.avg_pool2d(x, 4).flatten(1).double(), y) for x, y in (data.train, data.test))


@pytest.fixture(scope="module")
def network(mnist):
    """49-16-10, trained on the subset."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(49, 16), nn.ReLU(), nn.Linear(16, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        per_example(model, mnist[0]).mean().backward()
        optimizer.step()
    assert (model(mnist[0][0]).argmax(dim=1) == mnist[0][1]).double().mean() > 0.9
    return model


@pytest.mark.data
@pytest.mark.skipif("REFLUENCE_DATA" not in os.environ, reason="$REFLUENCE_DATA is not set: no MNIST files")
@pytest.mark.parametrize("batch_size", [300, 77])
def test_gram_scores_of_a_trained_network_equal_the_dense_solve(network, mnist, batch_size):
    train, test = mnist
    names = [name for name, _ in network.named_parameters()]
    G, V = (loop_gradients(network, per_example, names, data) for data in mnist)
    influence = rf.Influence(rf.Task(network), solver=rf.solvers.Gram(), damping=1e-2, batch_size=batch_size)
    expected = scores(V, G, 1e-2)
    values = influence.fit(train).score(test).values
    torch.testing.assert_close(values, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


# ---------------------------------------------------------------- digits

L2, N, TESTS, REMOVED = 1e-2, 250, 6, 8


class Regression:
    """Multinomial logistic regression on digits, minimising (1/n) Σ w_i loss_i + (l2/2)‖θ‖² by Newton in float64."""

    def __init__(self):
        data = load_dataset("digits", n_train=N, n_test=TESTS)
        self.train, self.test = ((x.flatten(1).double(), y) for x, y in (data.train, data.test))
        self.theta = self.fitted(torch.ones(N, dtype=torch.float64), torch.zeros(10, 65, dtype=torch.float64))

    def fitted(self, weights, start):
        x = torch.cat([self.train[0], torch.ones(N, 1, dtype=torch.float64)], dim=1)
        theta = start
        for _ in range(30):
            p = (x @ theta.T).softmax(dim=1)
            gradient = ((p - F.one_hot(self.train[1], 10)) * weights[:, None]).T @ x / N + L2 * theta
            if gradient.norm() < 1e-10:
                return theta
            J = (p[:, :, None] * x[:, None, :]).flatten(1)
            hessian = -(J * weights[:, None]).T @ J / N + L2 * torch.eye(650, dtype=torch.float64)
            for c in range(10):
                own = slice(65 * c, 65 * (c + 1))
                hessian[own, own] += (x * (weights * p[:, c])[:, None]).T @ x / N
            theta = theta - torch.linalg.solve(hessian, gradient.flatten()).reshape(10, 65)
        raise AssertionError("Newton's method did not converge")

    def losses(self, theta):
        logits = self.test[0] @ theta[:, :64].T + theta[:, 64]
        return F.cross_entropy(logits, self.test[1], reduction="none")

    def change_without(self, rows):
        """Change of the test losses when train rows are left out and the model is fitted anew."""
        weights = torch.ones(N, dtype=torch.float64)
        weights[rows] = 0
        return self.losses(self.fitted(weights, self.theta)) - self.losses(self.theta)

    def model(self):
        model = nn.Linear(64, 10).double()
        with torch.no_grad():
            model.weight.copy_(self.theta[:, :64])
            model.bias.copy_(self.theta[:, 64])
        return model


@pytest.fixture(scope="module")
def regression():
    return Regression()


@pytest.fixture(scope="module")
def found(regression):
    task = rf.Task(regression.model(), l2=L2)
    influence = rf.Influence(task, solver=rf.solvers.Gram(), damping=0.0).fit(regression.train)
    assert influence.gradient_norm < 1e-9
    return influence.score(regression.test)


def test_leaving_out_the_most_influential_digits_changes_the_losses_as_predicted(regression, found):
    """The empirical Fisher stands for the Hessian here, so ranks and signs are held to, not sizes.

    All 96 signs agree and Spearman's ρ is 0.97; by chance ρ would be 0 ± 1/√95 = ±0.1.
    """
    predicted, real = [], []
    for table in (found.top(REMOVED), found.bottom(REMOVED)):
        for row, test, change in zip(table["train"], table["test"], table["predicted_loo_change"], strict=True):
            predicted.append(change)
            real.append(float(regression.change_without([row])[test]))
    predicted, real = torch.tensor(predicted), torch.tensor(real)
    assert len(predicted) == 2 * REMOVED * TESTS
    assert spearmanr(predicted, real).statistic > 0.9
    assert (predicted.sign() == real.sign()).double().mean() > 0.95


def test_leaving_out_the_most_helpful_together_raises_each_loss_and_the_most_harmful_lowers_it(regression, found):
    for test in range(TESTS):
        for table, sign in ((found.top(REMOVED), 1), (found.bottom(REMOVED), -1)):
            rows = table[table["test"] == test]["train"].tolist()
            assert sign * float(regression.change_without(rows)[test]) > 0
