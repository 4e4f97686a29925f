"""∂score/∂x of a training example, against the closed form of least squares with 20 inputs and 4 outputs."""

import pytest
import torch
from torch import nn

import refluence as rf
from refluence.errors import DataError, TaskError

INPUTS, OUTPUTS, N, K, LAMBDA = 20, 4, 11, 5, 0.05


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def model():
    model = nn.Linear(INPUTS, OUTPUTS).double()
    model.weight.data, model.bias.data = normal(OUTPUTS, INPUTS, seed=1), normal(OUTPUTS, seed=2)
    return model


def rows(n, seed):
    return normal(n, INPUTS, seed=seed), normal(n, OUTPUTS, seed=seed + 1)


TRAIN, TEST = rows(N, 3), rows(K, 5)
WEIGHTS = torch.linspace(0, 2, N, dtype=torch.float64)


def closed(model, train, test, curvature, weights=None):
    """ℓ = ‖r‖²/4 with r = Wx + b − y, so ∇_W ℓ = r xᵀ/2, ∇_b ℓ = r/2, and the Hessian is I ⊗ x̃x̃ᵀ/2 with x̃ = (x, 1).

    s = (S, t) solves (C + λ)s = ∇ℓ_test; ∂/∂x of ⟨s, ∇ℓ⟩ = rᵀ(Sx + t)/2 is (Wᵀ(Sx + t) + Sᵀr)/2.
    """
    W, b = model.weight.detach(), model.bias.detach()
    w = torch.ones(len(train[0]), dtype=torch.float64) if weights is None else weights

    def joint(data):  # (n, 4, 21): the gradient in [W b], and the residuals
        x, y = data
        residual = x @ W.T + b - y
        ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        return residual[:, :, None] * ones[:, None] / 2, residual, ones

    G, residual, ones = joint(train)
    V = joint(test)[0].flatten(1)
    if curvature == "fisher":
        C = (G.flatten(1) * w[:, None]).T @ G.flatten(1) / len(G)
    else:
        C = torch.kron(torch.eye(OUTPUTS, dtype=torch.float64), (ones * w[:, None]).T @ ones / (2 * len(G)))
    s = torch.linalg.solve(C + LAMBDA * torch.eye(len(C), dtype=torch.float64), V.T).T
    s = s.reshape(-1, OUTPUTS, INPUTS + 1)
    S, t = s[:, :, :-1], s[:, :, -1]
    inner = torch.einsum("koi,ni->kno", S, train[0]) + t[:, None]
    found = (inner @ W + torch.einsum("koi,no->kni", S, residual)) / 2
    scores = torch.einsum("koj,noj->kn", s, G)
    return found * w[:, None], scores * w


def fitted(model, curvature="hessian", solver=None, train=TRAIN, weights=None, **options):
    task = rf.Task(model, loss="mse")
    options = {"damping": LAMBDA, "batch_size": 4, "progress": False, **options}
    return rf.Influence(task, curvature, solver or rf.solvers.Dense(), **options).fit(train, weights=weights)


def assert_equal(found, expected, rtol=1e-9):
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


SOLVERS = {
    "dense": (rf.solvers.Dense(), 1e-9),
    "gram": (rf.solvers.Gram(), 1e-9),
    "cg": (rf.solvers.ConjugateGradient(rtol=1e-10), 1e-8),
}


@pytest.mark.parametrize(
    ("curvature", "solver"),
    [
        ("fisher", "dense"),
        ("fisher", "gram"),
        ("fisher", "cg"),
        ("ggn", "dense"),
        ("ggn", "gram"),
        ("hessian", "dense"),
        ("hessian", "cg"),
    ],
)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
def test_it_is_the_closed_form(model, curvature, solver, weights):
    solver, rtol = SOLVERS[solver]
    influence = fitted(model, curvature, solver, weights=weights)
    expected, scores = closed(model, TRAIN, TEST, curvature, weights)
    assert_equal(influence.score(TEST).values, scores, rtol)
    assert_equal(influence.perturbation(TEST), expected, rtol)


@pytest.mark.parametrize("rows", [[3], [10, 0, 4], [7, 7, 1, 2, 3, 5], tuple(range(N)), range(2, 9, 3)])
def test_some_rows_are_those_columns_in_their_order(model, rows):
    expected, _ = closed(model, TRAIN, TEST, "hessian", WEIGHTS)
    found = fitted(model, weights=WEIGHTS).perturbation(TEST, rows=rows)
    assert_equal(found, expected[:, list(rows)])


def test_more_tests_than_training_examples(model):
    train, test = rows(3, 20), rows(40, 22)
    expected, _ = closed(model, train, test, "ggn")
    assert_equal(fitted(model, "ggn", train=train).perturbation(test), expected)


def test_one_training_example_and_one_test(model):
    train, test = rows(1, 20), rows(1, 22)
    expected, _ = closed(model, train, test, "hessian")
    assert_equal(fitted(model, train=train).perturbation(test), expected)


def test_it_is_streamed_batch_by_batch(model):
    influence = fitted(model, weights=WEIGHTS, batch_size=4)
    parts = list(influence.perturbations(TEST))
    assert [chosen for chosen, _ in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert_equal(torch.cat([part for _, part in parts], dim=1), closed(model, TRAIN, TEST, "hessian", WEIGHTS)[0])
    some = list(influence.perturbations(TEST, rows=[9, 1, 5, 0, 2]))
    assert [chosen for chosen, _ in some] == [[9, 1, 5, 0], [2]]


@pytest.mark.parametrize("blocks", ["module", "parameter"])
def test_over_blocks_it_is_a_central_difference_of_the_score(blocks):
    """C and the test side held fixed: only the gradient of the training example moves with its input."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3, generator=generator, dtype=torch.float64), torch.randint(2, (6,), generator=generator)
    influence = rf.Influence(rf.Task(model), "ggn", rf.solvers.Dense(), 0.1, blocks, batch_size=4, progress=False)
    influence.fit((x, y))
    directions = influence.inverse_hvp((x[:2], y[:2]))
    found = influence.perturbation((x[:2], y[:2]), rows=[4])
    step = 1e-6
    for i in range(3):
        sides = []
        for sign in (1, -1):
            moved = x[4:5].clone()
            moved[0, i] += sign * step
            losses = nn.functional.cross_entropy(model(moved), y[4:5])
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(losses, list(model.parameters()))])
            sides.append(directions @ gradient)
        expected = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(found[:, 0, i], expected, rtol=1e-6, atol=1e-8)


def test_integer_inputs_are_refused(model):
    embedding = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 2)).double()
    tokens = torch.randint(5, (7, 3), generator=torch.Generator().manual_seed(0)), torch.arange(7) % 2
    influence = rf.Influence(rf.Task(embedding), damping=0.1, progress=False).fit(tokens)
    with pytest.raises(TaskError, match=r"int64 of shape .* no derivative"):
        influence.perturbation(tokens)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [([0, N], f"rows has {N}, but the train examples are 0 to {N - 1}"), ([-1], "rows has -1"), ([], "rows is empty")],
)
def test_rows_that_are_not_there_are_refused(model, chosen, words):
    with pytest.raises(DataError, match=words):
        fitted(model).perturbation(TEST, rows=chosen)
