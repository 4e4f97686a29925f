"""Solvers and curvatures on what once gave, or could give, silently wrong numbers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import refluence as rf
from refluence.errors import DataError, PlanError, SolverError, TaskError
from refluence.solvers import (
    Arnoldi,
    ConjugateGradient,
    Dense,
    Ekfac,
    Gram,
    HarmonicMean,
    Identity,
    Kfac,
    Lissa,
    Nystroem,
    Sketched,
)
from support.least_squares import ALL, CURVATURES, EXACT, all_solvers, exact_solvers, expected_scores, fitted, linear
from support.problems import N, close, damped, problem
from support.reference import loop_gradients

# ---------------------------------------------------------------- shapes


@exact_solvers
def test_more_right_hand_sides_than_parameters(solver):
    model, train = linear()
    _, test = linear(n=50, seed=1)
    influence = fitted(model, train, solver)
    expected, own = expected_scores(model, train, test, "ggn", 0.1)
    found = influence.score(test).values
    assert found.shape == (50, 24)
    close(found, expected, 1e-7)
    close(influence.self_influence(), own, 1e-7)
    assert bool((found.abs().sum(dim=1) > 0).all())


@exact_solvers
@pytest.mark.parametrize("curvature", ["fisher", "ggn"])
def test_equal_right_hand_sides_and_zero_ones(solver, curvature):
    """Blocks of right-hand sides that depend on each other, and one that is zero."""
    model, train = linear()
    _, (x, y) = linear(n=4, seed=1)
    zero = torch.zeros(1, 3).double(), model.bias.detach()[None]
    test = torch.cat([x, x[:2], zero[0]]), torch.cat([y, y[:2], zero[1]])
    influence = fitted(model, train, solver, curvature)
    found = influence.score(test).values
    close(found, expected_scores(model, train, test, curvature, 0.1)[0], 1e-7)
    assert torch.equal(found[6], torch.zeros(24).double())


@all_solvers
def test_an_example_with_zero_gradient_neither_helps_nor_harms(solver):
    model, (x, y) = linear()
    y = y.clone()
    y[7] = model(x[7]).detach()
    influence = fitted(model, (x, y), solver, "fisher")
    test = linear(n=5, seed=1)[1]
    found = influence.score(test).values
    assert float(found[:, 7].abs().max()) <= 1e-14 * float(found.abs().max())
    own = influence.self_influence()
    assert abs(float(own[7])) <= 1e-14 * float(own.max())
    if solver in EXACT.values():
        close(found, expected_scores(model, (x, y), test, "fisher", 0.1)[0], 1e-7)


@exact_solvers
@pytest.mark.parametrize("curvature", ["fisher", "ggn", "mc_fisher"])
def test_one_train_and_one_test_example(solver, curvature):
    p = problem("mlp")
    train, test = (tuple(x[:1] for x in data) for data in (p.train, p.test))
    influence = fitted(p.model, train, solver, curvature, loss="cross_entropy")
    found = influence.score(test)
    assert found.shape == (1, 1)
    assert influence.inverse_hvp(test).shape == (1, 43)
    if curvature != "mc_fisher":
        close(found.values, expected_scores(p.model, train, test, curvature, 0.1, "cross_entropy")[0], 1e-7)


@all_solvers
def test_an_empty_test_set_is_an_error(solver):
    model, train = linear()
    influence = fitted(model, train, solver, "fisher")
    empty = tuple(x[:0] for x in train)
    for ask in (influence.score, influence.inverse_hvp, influence.perturbation):
        with pytest.raises(DataError, match="empty"):
            ask(empty)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_single_class_has_no_gradient_and_no_curvature(curvature):
    """log p = 0 whatever the parameters: everything is zero, and nothing is NaN."""
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
    data = x, torch.zeros(6, dtype=torch.int64)
    for solver in (Dense(), ConjugateGradient(), Arnoldi(10), *([] if curvature == "hessian" else [Gram(), Ekfac()])):
        influence = fitted(nn.Linear(3, 1).double(), data, solver, curvature, loss="cross_entropy")
        assert torch.equal(influence.score(data).values, torch.zeros(6, 6).double())
        assert influence.effective_dimension == 0


# ---------------------------------------------------------------- rank and damping


def singular():
    """Least squares with a column that is the sum of the others and one that is zero."""
    model, (x, y) = linear(n=24, inputs=5)
    x[:, 3], x[:, 4] = x[:, :3].sum(dim=1), 0
    return model, (x, y)


@exact_solvers
@pytest.mark.parametrize("damping", [0.1, 1e-3])
def test_a_curvature_of_low_rank(solver, damping):
    if isinstance(solver, Lissa) and damping < 0.1:
        pytest.skip("many thousand steps: Lissa's own tests")
    model, train = singular()
    test = linear(n=4, inputs=5, seed=1)[1]
    influence = fitted(model, train, solver, damping=damping)
    # The test gradients lie partly outside the range, where the damping alone is inverted.
    close(influence.score(test).values, expected_scores(model, train, test, "ggn", damping)[0], 1e-7)


@pytest.mark.parametrize("solver", [s for s in ALL.values() if not isinstance(s, Identity)], ids=lambda s: str(s)[:20])
def test_without_damping_a_singular_curvature_is_an_error(solver):
    model, train = singular()
    curvature = "fisher" if isinstance(solver, HarmonicMean) else "ggn"
    test = linear(n=4, inputs=5, seed=1)[1]
    if isinstance(solver, Sketched):
        solver = Sketched(rf.sketches.Gaussian(12), corrected=False)
    with pytest.raises((PlanError, SolverError), match="damping"):
        fitted(model, train, solver, curvature, damping=0.0).score(test)


@pytest.mark.parametrize("name", [name for name in EXACT if name != "Gram"])
@pytest.mark.parametrize("curvature", ["fisher", "ggn", "hessian"])
def test_without_damping_a_regular_curvature_has_its_inverse(name, curvature):
    if curvature == "hessian" and name in ("Nystroem", "Lissa"):
        pytest.skip("the first has no Hessian, the second takes long on one")
    model, train = linear(n=40)
    test = linear(n=4, seed=1)[1]
    influence = fitted(model, train, EXACT[name], curvature, damping=0.0)
    expected, own = expected_scores(model, train, test, curvature, 0.0)
    close(influence.score(test).values, expected, 1e-6)
    close(influence.self_influence(), own, 1e-6)


def test_without_damping_the_gram_of_gradients_that_span_the_parameters_gives_scores_and_names_dense_for_the_rest():
    model, train = linear(n=40)
    test = linear(n=4, seed=1)[1]
    influence = fitted(model, train, Gram(), "fisher", damping=0.0)
    expected, own = expected_scores(model, train, test, "fisher", 0.0)
    close(influence.score(test).values, expected, 1e-8)
    close(influence.self_influence(), own, 1e-8)
    with pytest.raises(PlanError, match="Dense at damping 0"):
        influence.inverse_hvp(test)
    with pytest.raises(PlanError, match="Dense at damping 0"):
        fitted(model, train, Gram(), "ggn", damping=0.0).score(test)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("curvature", CURVATURES)
@all_solvers
def test_float32_is_float64_to_a_part_in_ten_thousand_of_the_largest(solver, curvature):
    """Gradients in float32 carry 1e-7 each; at κ = (λ_max + μ)/μ of about 10 that is 1e-6, and 1e-4 leaves room."""
    refused = {"hessian": (Gram, HarmonicMean, Nystroem, Kfac, Ekfac), "ggn": (HarmonicMean,)}
    refused["true_fisher"] = refused["ggn"]
    if isinstance(solver, refused.get(curvature, ())):
        pytest.skip("not allowed: tests/test_matrix.py")
    if isinstance(solver, ConjugateGradient | Lissa):
        solver = ConjugateGradient(rtol=1e-7, block=solver.block) if isinstance(solver, ConjugateGradient) else Lissa(
            tolerance=1e-5
        )  # fmt: skip
    model, train = linear()
    test = linear(n=4, seed=1)[1]
    low = copy.deepcopy(model).float()
    single = [tuple(x.float() for x in data) for data in (train, test)]
    exact = fitted(model, train, solver, curvature, damping=0.3).score(test).values
    found = fitted(low, single[0], solver, curvature, damping=0.3)
    assert found.coverage is not None
    close(found.score(single[1]).values, exact, 1e-4)


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_loss_that_returns_one_number_is_an_error_with_the_remedy(curvature, reduction):
    p = problem("mlp")

    def scalar(output, batch):
        return F.cross_entropy(output, batch[1], reduction=reduction)

    for data in (p.train, tuple(x[:1] for x in p.train)):
        with pytest.raises(TaskError, match=r"reduction=.none."):
            fitted(p.model, data, Dense(), curvature, loss=scalar)


def test_a_loss_for_each_output_is_an_error():
    model, train = linear()
    with pytest.raises(TaskError, match=r"\(24, 2\)|\(16, 2\)|shape"):
        fitted(model, train, Dense(), loss=lambda out, batch: F.mse_loss(out, batch[1], reduction="none"))


# ---------------------------------------------------------------- indefinite Hessians


def fit_and_score(p, solver):
    influence = fitted(p.model, p.train, solver, "hessian", 0.01, loss="cross_entropy")
    return influence, influence.score(p.test).values


def test_on_an_indefinite_hessian_dense_is_the_plain_inverse_and_warns():
    p = problem("mlp")
    C = p.curvature("hessian")
    assert float(torch.linalg.eigvalsh(C)[0]) < -0.1
    with pytest.warns(UserWarning, match=r"negative.*damping above 0\.59.*\"ggn\""):
        influence, found = fit_and_score(p, Dense())
    close(found, p.expected("full", {"full": torch.linalg.inv(damped(C, 0.01))})[0], 1e-8)
    assert influence.diagnostics["negative_shifted"]["full"] == int((torch.linalg.eigvalsh(C) < -0.01).sum())
    negative = int((torch.linalg.eigvalsh(C) < -1e-12).sum())
    assert influence.diagnostics["negative_eigenvalues"]["full"] == negative
    with pytest.warns(RuntimeWarning, match="negative eigenvalues"):
        influence, projected = fit_and_score(p, Arnoldi(100))
    close(projected, found, 1e-7)
    # The softmax leaves six directions flat, whose eigenvalues are zero to rounding and of either sign.
    assert influence.diagnostics["negative_eigenvalues"]["full"] == negative


@pytest.mark.parametrize(
    "solver", [ConjugateGradient(), ConjugateGradient(block=False), Lissa()], ids=["CG", "CG by columns", "Lissa"]
)
def test_on_an_indefinite_hessian_iterative_solvers_stop_and_name_a_damping_that_works(solver):
    p = problem("mlp")
    lowest = -float(torch.linalg.eigvalsh(p.curvature("hessian"))[0])
    with pytest.raises(SolverError, match=r"damping above|ggn"):
        fitted(p.model, p.train, solver, "hessian", 0.01, loss="cross_entropy").score(p.test)
    enough = fitted(p.model, p.train, solver, "hessian", 1.1 * lowest, loss="cross_entropy")
    H = torch.linalg.inv(damped(p.curvature("hessian"), 1.1 * lowest))
    close(enough.score(p.test).values, p.expected("full", {"full": H})[0], 2e-2)


def test_the_gradients_of_the_matrix_problems_are_those_of_a_loop():
    """Of these tests' own reference: the rows of the Fisher, once more by the losses of the library."""
    p = problem("tied")
    task = p.task()
    expected = loop_gradients(p.model, lambda m, part: task.losses(m(part[0]), part), p.names, p.train)
    close(p.reference.gradients, expected, 1e-12)
    assert len(expected) == N
