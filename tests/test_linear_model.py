"""The linear model with least squares, where everything is known in closed form: 20 inputs, 4 outputs."""

import pytest
import torch

import refluence as rf
from refluence.solvers import Arnoldi, ConjugateGradient, Dense, Ekfac, Gram, Kfac, Lissa, Nystroem
from support.curvatures import LeastSquares
from support.problems import close, damped

L2 = 0.05
DAMPINGS = (0.1, 1e-2, 1e-3)
LINEAR = LeastSquares()
TEST = LeastSquares(n=7, seed=1)
SOLVERS = [
    Dense(), Gram(), ConjugateGradient(rtol=1e-12), ConjugateGradient(rtol=1e-12, block=False),
    Arnoldi(200, tolerance=1e-12), Nystroem(200), Kfac(), Ekfac(), Lissa(tolerance=1e-10),
]  # fmt: skip


def fitted(solver, curvature, damping, batch_size=16, weights=None):
    task = rf.Task(LINEAR.model(), loss="mse", l2=L2)
    influence = rf.Influence(
        task, curvature=curvature, solver=solver, damping=damping, batch_size=batch_size, progress=False
    )
    return influence.fit((LINEAR.x, LINEAR.y), weights=weights)


def inverse(shift):
    return torch.linalg.inv(damped(LINEAR.hessian(LINEAR.x), shift))


@pytest.mark.parametrize("curvature", ["ggn", "hessian", "true_fisher"])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_scores_are_those_of_the_closed_form(solver, curvature):
    """K-FAC too: one position, and outputs that do not mix with inputs."""
    if curvature == "hessian" and isinstance(solver, Gram | Nystroem | Kfac | Ekfac | Lissa):
        pytest.skip("these have no Hessian, or take long: tests/test_matrix.py")
    G, V = LINEAR.gradients(LINEAR.x, LINEAR.y), LINEAR.gradients(TEST.x, TEST.y)
    base = fitted(solver, curvature, 0.1)
    for damping in DAMPINGS[: 1 if isinstance(solver, Lissa) else 3]:
        influence, H = base.at(damping), inverse(L2 + damping)
        close(influence.score((TEST.x, TEST.y)).values, V @ H @ G.T)
        close(influence.self_influence(), ((G @ H) * G).sum(dim=1))
        close(influence.inverse_hvp((TEST.x, TEST.y)), V @ H)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("rows", [None, [4, 0, 30]])
def test_perturbations_are_those_of_the_closed_form(curvature, rows, weighted):
    solver = Dense() if curvature == "hessian" else Gram()
    influence = fitted(solver, curvature, 1e-2, weights=None)
    w = torch.ones(31).double()
    C = LINEAR.hessian(LINEAR.x)
    if weighted:
        w = torch.linspace(0, 2, 31).double()
        influence = fitted(solver, curvature, 1e-2, weights=w)
        scaled = torch.cat([LINEAR.x, torch.ones(31, 1).double()], 1) * w.sqrt()[:, None]
        C = 0.5 * torch.kron(torch.eye(4).double(), scaled.T @ scaled / 31)
        order = torch.arange(84).reshape(4, 21)
        order = torch.cat([order[:, :-1].flatten(), order[:, -1]])
        C = C[order][:, order]
    directions = LINEAR.gradients(TEST.x, TEST.y) @ torch.linalg.inv(damped(C, L2 + 1e-2))
    expected = LINEAR.mixed(LINEAR.x, LINEAR.y, directions) * w[None, :, None]
    found = influence.perturbation((TEST.x, TEST.y), rows=rows)
    close(found, expected if rows is None else expected[:, rows])


def test_the_closed_forms_are_those_of_autograd():
    """Of this test's own reference."""
    model, loss = LINEAR.model(), torch.nn.functional.mse_loss
    x = LINEAR.x[:3].clone().requires_grad_()
    leaves = [model.weight, model.bias]
    for i in range(3):
        found = torch.autograd.grad(loss(model(x[i]), LINEAR.y[i]), leaves, create_graph=True)
        flat = torch.cat([part.flatten() for part in found])
        close(flat.detach(), LINEAR.gradients(LINEAR.x, LINEAR.y)[i], 1e-12)
        direction = torch.randn(1, 84, generator=torch.Generator().manual_seed(i)).double()
        mixed = torch.autograd.grad(flat @ direction[0], x, retain_graph=True)[0][i]
        close(mixed, LINEAR.mixed(LINEAR.x, LINEAR.y, direction)[0, i], 1e-12)
    hessian = torch.autograd.functional.hessian(
        lambda theta: loss(LINEAR.x @ theta[:80].reshape(4, 20).T + theta[80:], LINEAR.y), torch.zeros(84).double()
    )
    close(LINEAR.hessian(LINEAR.x), hessian, 1e-12)


def test_leave_one_out_of_the_quadratic_is_predicted_to_first_order():
    """At the minimum, a share δ of an example's loss moves the parameters by −δ/n·H⁻¹g: the scores are a derivative."""
    x, y = LINEAR.x, LINEAR.y
    weights = torch.ones(31).double()

    def minimum(w):
        model = LeastSquares()
        scaled = torch.cat([x, torch.ones(31, 1).double()], 1)
        moment = 0.5 * (scaled * w[:, None]).T @ scaled / 31 + L2 * torch.eye(21).double()
        theta = torch.linalg.solve(moment, 0.5 * (scaled * w[:, None]).T @ y / 31)
        model.W, model.b = theta[:20].T.contiguous(), theta[20]
        return model

    at = minimum(weights)
    task = rf.Task(at.model(), loss="mse", l2=L2)
    influence = rf.Influence(task, curvature="ggn", solver=Gram(), damping=1e-12, progress=False).fit((x, y))
    found = influence.score((TEST.x, TEST.y)).values[:, 5]
    step = 1e-4
    moved = []
    for sign in (1, -1):
        w = weights.clone()
        w[5] -= sign * step
        other = minimum(w)
        moved.append((TEST.x @ other.W.T + other.b - TEST.y).square().mean(dim=1))
    # Removing a share `step` of the example changes the loss by step·τ/n.
    close(found / 31, (moved[0] - moved[1]) / (2 * step), 1e-5)
