"""The bridge to influence: one path, two names; and the leverage of a network's examples, without labels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import refluence as rf
from refluence.errors import PlanError
from refluence.leverage import block_leverage
from support.leverage import ridge


def network(seed=0, outputs=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    return model, (torch.randn(23, 6).double(), torch.randint(0, outputs, (23,)))


def gradients(task, model, data):
    """One row a train example, by a loop of autograd.grad."""
    rows = []
    for i in range(len(data[0])):
        loss = task.losses(task.output(model, (data[0][i : i + 1], data[1][i : i + 1])), (None, data[1][i : i + 1]))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), list(model.parameters()))]))
    return torch.stack(rows)


@pytest.mark.parametrize("damping", [1e-3, rf.RelativeDamping(0.1), rf.EffectiveDimension(8.0)])
@pytest.mark.parametrize("solver", [rf.solvers.Gram(), rf.solvers.Dense()])
def test_self_influence_is_n_times_the_ridge_leverage_of_the_gradients(damping, solver):
    model, data = network()
    task = rf.Task(model)
    influence = rf.Influence(task, solver=solver, damping=damping, progress=False).fit(data)
    G = gradients(task, model, data)
    for method in ("auto", "exact", "gram", "dual"):
        scores = rf.leverage_scores(G, damping, method)
        torch.testing.assert_close(influence.self_influence(), 23 * scores.values, rtol=1e-8, atol=1e-10)
        assert scores.damping == pytest.approx(influence.damping, rel=1e-9)
        assert scores.effective_dimension == pytest.approx(influence.effective_dimension, rel=1e-9)


def test_the_identity_on_digits():
    from refluence.zoo import load_dataset

    x, y = load_dataset("digits", n_train=300).train
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    task = rf.Task(model)
    data = (x.double(), y)
    influence = rf.Influence(task, damping=1e-4, progress=False).fit(data)
    scores = rf.leverage_scores(gradients(task, model, data), 1e-4)
    torch.testing.assert_close(influence.self_influence(), 300 * scores.values, rtol=1e-8, atol=1e-9)


def jacobian_leverage(model, x, loss, shift, weights):
    """L_i from Jacobians of single examples and loss Hessians by autodiff."""
    parameters = list(model.parameters())
    J, Lam = [], []
    for i in range(len(x)):
        out = model(x[i : i + 1])[0]
        rows = [torch.autograd.grad(o, parameters, retain_graph=True) for o in out]
        J.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
        Lam.append(weights[i] * torch.func.hessian(loss)(out.detach()))
    J, Lam = torch.stack(J), torch.stack(Lam)
    H = torch.einsum("iqd,iqp,ipe->de", J, Lam, J) / len(x) + shift * torch.eye(J.shape[2]).double()
    inner = torch.einsum("iqd,de,ipe->iqp", J, torch.linalg.inv(len(x) * H), J)
    return torch.linalg.eigvals(Lam @ inner).real.sort(dim=1).values


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("solver", [rf.solvers.Dense(), rf.solvers.Gram(), rf.solvers.ConjugateGradient(rtol=1e-12)])
@pytest.mark.parametrize("weighted", [False, True])
def test_block_leverage_has_the_spectrum_of_the_jacobian_formula(loss, solver, weighted):
    model, (x, y) = network()
    targets = torch.randn(23, 3).double() if loss == "mse" else y
    w = torch.linspace(0.5, 2, 23).double() if weighted else torch.ones(23).double()
    influence = rf.Influence(rf.Task(model, loss, l2=0.01), "ggn", solver, 0.02, batch_size=9, progress=False)
    influence.fit((x, targets), weights=w if weighted else None)
    found = block_leverage(influence)

    def of_output(out):
        if loss == "mse":
            return (out - 1.0).square().mean()
        return torch.logsumexp(out, dim=0) - out[0]

    expected = jacobian_leverage(model, x, of_output, 0.03, w)
    torch.testing.assert_close(torch.linalg.eigvalsh(found.matrices), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.values, expected.sum(dim=1), rtol=1e-8, atol=1e-10)
    assert float(found.values.sum()) == pytest.approx(influence.effective_dimension, rel=1e-6)
    assert float(torch.linalg.eigvalsh(found.matrices).max()) < 1


def test_block_leverage_needs_no_labels():
    model, (x, y) = network()
    one, other = (
        block_leverage(rf.Influence(rf.Task(model), "ggn", damping=0.01, progress=False).fit((x, labels))).matrices
        for labels in (y, (y + 1) % 3)
    )
    assert torch.equal(one, other)


def test_block_leverage_of_a_linear_model_with_squared_loss_is_that_of_its_inputs():
    model, (x, _) = nn.Linear(6, 1, bias=False).double(), network()[1]
    influence = rf.Influence(rf.Task(model, "mse"), "ggn", damping=0.2, progress=False).fit(
        (x, torch.zeros(23, 1).double())
    )
    # mse has the Hessian 2, so that λ = 0.2 of it is 0.1 of XᵀX/n
    torch.testing.assert_close(block_leverage(influence).values, ridge(x, 0.1), rtol=1e-9, atol=1e-12)


def test_block_leverage_of_blocks_adds_up():
    model, data = network()
    influence = rf.Influence(rf.Task(model), "ggn", damping=0.01, blocks="module", progress=False).fit(data)
    assert float(block_leverage(influence).values.sum()) == pytest.approx(influence.effective_dimension, rel=1e-6)


def test_other_curvatures_are_refused():
    model, data = network()
    with pytest.raises(PlanError, match='the curvature is "fisher": fit with "ggn"'):
        block_leverage(rf.Influence(rf.Task(model), damping=0.1, progress=False).fit(data))
    identity = rf.Influence(rf.Task(model), "ggn", rf.solvers.Identity(), 0.1, progress=False).fit(data)
    with pytest.raises(PlanError, match="Identity solver has no curvature"):
        block_leverage(identity)
