"""K-FAC and EK-FAC: the exact values of their formulas, computed densely, and the cases in which they are exact."""

import pytest
import torch
from torch import nn

from refluence.solvers import Ekfac, Kfac
from support.kronecker import DAMPINGS, OWN, Pooled, Problem, check, made
from support.models import CASES, Case, N, rows

SOLVERS = [Kfac(), Ekfac(), Kfac(sharing="reduce"), Ekfac(sharing="reduce")]


def squared(output, batch):
    return (output - batch[1]).square().flatten(1).sum(dim=1)


FORMULAS = {
    name: CASES[name]
    for name in (
        "linear",
        "linear without bias",
        "biases only",
        "weights only",
        "frozen layer",
        "unused layer",
        "linear on sequences",
        "linear on images of positions",
        "conv1d stride, padding, no bias",
        "conv2d groups",
        "conv2d stride leaving a margin",
        "embedding",
        "embedding of one token",
        "layer norm on sequences",
        "one module used twice",
    )
} | OWN


@pytest.mark.parametrize("name", FORMULAS)
def test_every_layer_is_the_formula_of_its_explicit_factors(name):
    problem = Problem(FORMULAS[name], "fisher", blocks="full", weighted=True, batch_size=2)
    for solver, dampings in zip(SOLVERS, (DAMPINGS, DAMPINGS, (1e-2,), (1e-3,)), strict=True):
        state, _ = check(problem, solver, dampings)
        for group, C in problem.exact.items():
            assert state.traces[group] == pytest.approx(float(C.trace()), rel=1e-9)


@pytest.mark.parametrize("curvature", ["mc_fisher", "ggn", "true_fisher"])
@pytest.mark.parametrize("name", ["linear", "attention", "convolutions", "tied tokens", "embedding"])
def test_several_rows_an_example(curvature, name):
    problem = Problem(FORMULAS[name], curvature, weighted=True, batch_size=3)
    for solver in (Kfac(), Ekfac(sharing="reduce")):
        check(problem, solver, (1e-2,))


@pytest.mark.parametrize(
    "blocks", ["full", "module", "parameter", {"a": ["0.weight", "2.bias"], "b": ["2.weight", "0.bias"]}]
)
@pytest.mark.parametrize("batch_size", [N, 2])
def test_blocks_and_batches(blocks, batch_size):
    problem = Problem(CASES["linear"], "ggn", blocks, True, batch_size)
    for solver in SOLVERS:
        check(problem, solver, (1e-3,))


def test_a_loss_given_as_a_function_and_groups_of_damping():
    def loss(output, batch):
        return output.square().square().sum(dim=1) + output.logsumexp(dim=1)

    problem = Problem(Case("own", CASES["linear"].make, loss=loss), "ggn", "module", True)
    check(problem, Ekfac(), DAMPINGS)
    check(problem, Kfac(), DAMPINGS)


@pytest.mark.parametrize("name", ["linear", "linear without bias", "conv2d as wide as the image"])
@pytest.mark.parametrize("curvature", ["fisher", "ggn"])
def test_one_example_at_one_position_is_exact_weight_and_bias_together(name, curvature):
    make = CASES[name].make

    def single():
        model, batch = make()
        return model, tuple(x[:1] for x in batch)

    problem = Problem(
        Case("own", single, CASES[name].loss, CASES[name].forward), "fisher" if "conv" in name else curvature, "module"
    )
    for solver in SOLVERS:
        state = solver.prepare(problem.curvature)
        assert state.diagnostics["dense blocks"] == state.diagnostics["diagonal blocks"] == []
        for damping in DAMPINGS:
            shifts = problem.shifts(damping)
            # Rounding of the largest eigenvalue is that much of the damped smallest one.
            condition = max(float(C.norm()) / shifts[b] for b, C in problem.exact.items())
            rtol = max(1e-9, 100 * torch.finfo(torch.float64).eps * condition)
            assert rtol < 1e-5
            problem.check(state, problem.inverses(problem.exact, shifts), shifts, rtol)


DEEP_LINEAR = {
    "one position": (
        lambda: (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)), (rows(3), rows(2))),
        SOLVERS,
    ),
    "a loss over positions": (
        lambda: (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (rows(3, 3), rows(3, 2))),
        [Kfac(), Ekfac()],
    ),
    "averaged positions": (
        lambda: (Pooled(), (rows(3, 3), rows(2))),
        [Kfac(sharing="reduce"), Ekfac(sharing="reduce")],
    ),
}


@pytest.mark.parametrize("name", DEEP_LINEAR)
@pytest.mark.parametrize("loss", ["mse", squared])
@pytest.mark.parametrize("weighted", [False, True])
def test_deep_linear_networks_with_squared_loss_are_exact(name, loss, weighted):
    make, exact = DEEP_LINEAR[name]
    problem = Problem(made(make, loss=loss), "ggn", "module", weighted)
    for solver in exact:
        state = solver.prepare(problem.curvature)
        for damping in DAMPINGS:
            shifts = problem.shifts(damping)
            problem.check(state, problem.inverses(problem.exact, shifts), shifts, 1e-8)


def test_the_other_sharing_is_not_exact_where_one_is():
    """So that the two tests above can fail."""
    for name, solver in (("a loss over positions", Kfac(sharing="reduce")), ("averaged positions", Kfac())):
        problem = Problem(made(DEEP_LINEAR[name][0], loss="mse"), "ggn", "module")
        state = solver.prepare(problem.curvature)
        shifts = problem.shifts(1e-2)
        expected, *_ = problem.expected(problem.inverses(problem.exact, shifts))
        for block, scores in state.scores(problem.tests, shifts):
            assert float((scores - expected[block]).norm() / expected[block].norm()) > 1e-2


@pytest.mark.parametrize("name", ["linear", "attention", "convolutions"])
def test_ekfac_without_updated_eigenvalues_is_kfac(name):
    problem = Problem(FORMULAS[name], "mc_fisher", "module", True)
    shifts = problem.shifts(1e-2)
    ours = dict(Ekfac(update_eigenvalues=False).prepare(problem.curvature).scores(problem.tests, shifts))
    for block, scores in Kfac().prepare(problem.curvature).scores(problem.tests, shifts):
        assert torch.equal(ours[block], scores)
