"""Curvatures as operators: the same matrix from any batches and order, for many vectors, blocks and for scipy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import cg, eigsh
from torch import nn

import refluence as rf
from refluence import fitting
from refluence.curvature import FunctionalCurvature, OuterCurvature
from refluence.errors import TaskError
from refluence.solvers import Arnoldi, Dense, Gram
from support.curvatures import DenseReference
from support.problems import MODELS, SAMPLES, SEED, K, N, close, damped, problem

CURVATURES = ("fisher", "ggn", "hessian", "true_fisher", "mc_fisher")
STRUCTURES = ("full", "module", "parameter", "dict")
# Every curvature, and every block structure, on every model; weights and batches in turn.
CASES = [
    (model, curvature, STRUCTURES[(i + j) % 4], (N, 6, 3)[(i + 2 * j) % 3], bool((i + j // 2) % 2))
    for i, model in enumerate(MODELS)
    for j, curvature in enumerate(CURVATURES)
]


def curvature_of(model, name, structure="full", batch_size=N, weighted=False, order=None, solver=None):
    """The library's curvature, as `fit` makes it."""
    p = problem(model, weighted)
    train, weights = p.train, p.weights
    if order is not None:
        train = tuple(x[order] for x in train)
        weights = None if weights is None else weights[order]
    influence = rf.Influence(
        p.task(), curvature=name, solver=solver or rf.solvers.Identity(), damping=0.1, blocks=p.blocks(structure),
        batch_size=batch_size, samples=SAMPLES, seed=SEED, progress=False,
    )  # fmt: skip
    return influence.fit(train, weights=weights)._fit.curvature


@pytest.mark.parametrize(("model", "name", "structure", "batch_size", "weighted"), CASES)
def test_it_is_the_dense_reference_by_products_by_columns_and_by_its_diagonal(
    model, name, structure, batch_size, weighted
):
    curvature = curvature_of(model, name, structure, batch_size, weighted)
    expected = problem(model, weighted).curvatures(name, structure)
    assert curvature.dimensions == {block: len(C) for block, C in expected.items()}
    scale = max(float(C.abs().max()) for C in expected.values())
    generator = torch.Generator().manual_seed(0)
    vectors = {b: torch.randn(len(C), 3, generator=generator).double() for b, C in expected.items()}
    found = curvature.matvec(vectors)
    dense, diagonal, traces = curvature.dense(), curvature.diagonal(), curvature.traces()
    assert set(found) == set(dense) == set(diagonal) == set(traces) == set(expected)
    for block, C in expected.items():
        assert torch.equal(dense[block], dense[block].T)
        torch.testing.assert_close(dense[block], C, rtol=0, atol=1e-11 * scale)
        torch.testing.assert_close(found[block], C @ vectors[block], rtol=0, atol=1e-10 * scale)
        torch.testing.assert_close(diagonal[block], C.diagonal(), rtol=0, atol=1e-11 * scale)
        assert traces[block] == pytest.approx(float(C.trace()), abs=1e-10 * scale)
        # One block alone, for which the rest of the parameters are constants.
        torch.testing.assert_close(curvature.operator(block)(vectors[block]), found[block], rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("name", ["fisher", "ggn", "hessian", "true_fisher"])
@pytest.mark.parametrize("model", ["cnn", "tied"])
def test_any_batches_and_any_order_of_the_data_give_the_same_operator(model, name):
    d = len(problem(model, True).curvature(name))
    v = torch.randn(d, 2, generator=torch.Generator().manual_seed(0)).double()
    expected = curvature_of(model, name, weighted=True).operator("full")(v)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    for batch_size, given in ((2, None), (10, None), (4, order)):
        found = curvature_of(model, name, batch_size=batch_size, weighted=True, order=given).operator("full")(v)
        close(found, expected, 1e-12)


def test_sampled_labels_belong_to_rows_and_not_to_batches():
    v = torch.randn(len(problem("tied").curvature("mc_fisher")), 2).double()
    expected = curvature_of("tied", "mc_fisher").operator("full")(v)
    for batch_size in (1, 4, 10):
        close(curvature_of("tied", "mc_fisher", batch_size=batch_size).operator("full")(v), expected, 1e-12)


@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("model", ["mlp", "transformer"])
def test_products_with_many_columns_are_those_with_single_ones(model, name):
    """33, one above what a functional product takes together."""
    curvature = curvature_of(model, name, "module", 6, weighted=True)
    vectors = {b: torch.randn(d, 33).double() for b, d in curvature.dimensions.items()}
    found = curvature.matvec(vectors)
    strided = curvature.matvec({b: v.T.contiguous().T for b, v in vectors.items()})
    single = [curvature.matvec({b: v[:, i : i + 1] for b, v in vectors.items()}) for i in (0, 7, 31, 32)]
    for block in vectors:
        close(strided[block], found[block], 1e-12)
        for i, one in zip((0, 7, 31, 32), single, strict=True):
            close(one[block][:, 0], found[block][:, i], 1e-12)
        assert curvature.matvec({block: vectors[block][:, :0]})[block].shape == (len(vectors[block]), 0)


def test_products_are_linear_symmetric_and_leave_their_vectors_alone():
    curvature = curvature_of("nested", "hessian", weighted=True)
    U, V = (torch.randn(35, 4).double() for _ in range(2))
    kept, apply = U.clone(), curvature.operator("full")
    close(apply(2 * U - V), 2 * apply(U) - apply(V), 1e-12)
    close(V.T @ apply(U), apply(V).T @ U, 1e-12)
    assert torch.equal(U, kept)


# ---------------------------------------------------------------- scipy


@pytest.mark.parametrize("name", ["ggn", "hessian"])
def test_scipy_takes_it_as_a_linear_operator(name):
    curvature = curvature_of("mlp", name, batch_size=6, weighted=True)
    C = problem("mlp", True).curvature(name)
    operator = curvature.linear_operator()
    assert operator.shape == (43, 43)
    assert operator.dtype == np.float64
    values = eigsh(operator, k=4, which="LM", return_eigenvectors=False, v0=np.ones(43))
    expected = torch.linalg.eigvalsh(C)
    largest = expected[expected.abs().argsort()[-4:]].sort().values
    np.testing.assert_allclose(np.sort(values), largest.numpy(), rtol=1e-9)
    shift = 0.1 - min(0.0, float(expected[0]))
    right = np.linspace(-1, 1, 43)
    solution, info = cg(curvature.linear_operator("full", shift), right, rtol=1e-12, atol=0.0)
    assert info == 0
    close(torch.as_tensor(solution), torch.linalg.solve(damped(C, shift), torch.as_tensor(right)), 1e-9)
    np.testing.assert_allclose(operator @ np.eye(43)[:, :5], C[:, :5].numpy(), atol=1e-12)
    np.testing.assert_allclose(operator.rmatvec(right), C.numpy() @ right, atol=1e-12)
    assert operator.matvec(right.astype(np.float32)[:, None]).shape == (43, 1)


def test_a_linear_operator_of_several_blocks_asks_which():
    curvature = curvature_of("mlp", "ggn", "module")
    assert curvature.linear_operator("2").shape == (18, 18)
    with pytest.raises(rf.errors.RefluenceError, match=r"0.*2"):
        curvature.linear_operator()
    with pytest.raises(rf.errors.RefluenceError, match=r"'nothing'.*0.*2"):
        curvature.linear_operator("nothing")


# ---------------------------------------------------------------- l2, blocks


@pytest.mark.parametrize("solver", [Dense(), Gram(), Arnoldi(100)], ids=lambda s: type(s).__name__)
def test_l2_enters_as_so_much_more_damping(solver):
    p = problem("mlp")
    C = p.curvatures("ggn", "module")
    influence = rf.Influence(p.task(l2=0.03), "ggn", solver, damping=0.01, blocks="module", progress=False)
    influence.fit(p.train)
    expected = p.expected("module", {b: torch.linalg.inv(damped(matrix, 0.04)) for b, matrix in C.items()})
    close(influence.score(p.test).values, expected[0], 1e-8)
    close(influence.inverse_hvp(p.test), expected[2], 1e-8)
    assert influence.damping == 0.01
    dimension = sum(float(torch.trace(torch.linalg.solve(damped(m, 0.04), m))) for m in C.values())
    assert influence.effective_dimension == pytest.approx(dimension, rel=1e-8)


def test_modules_within_modules_and_parameters_of_the_root_form_blocks():
    curvature = curvature_of("nested", "hessian", "module")
    assert curvature.dimensions == {"(root)": 5, "body.0.0": 15, "body.0.1": 6, "head": 9}


def test_scores_by_block_sum_to_the_scores():
    p = problem("nested")
    influence = rf.Influence(p.task(), "ggn", Dense(), damping=0.01, blocks="module", progress=False).fit(p.train)
    parts = influence.score(p.test, by_block=True)
    assert set(parts) == set(p.groups("module"))
    close(sum(part.values for part in parts.values()), influence.score(p.test).values, 1e-12)


# ---------------------------------------------------------------- by passes and by rows


@pytest.mark.parametrize("name", ["ggn", "true_fisher"])
@pytest.mark.parametrize("model", list(MODELS))
def test_by_passes_it_is_what_it_is_by_rows(model, name, monkeypatch):
    by_rows = curvature_of(model, name, "module", 6, weighted=True)
    monkeypatch.setattr(fitting, "MOST_OUTPUTS", 0)
    by_passes = curvature_of(model, name, "module", 6, weighted=True)
    assert isinstance(by_rows, OuterCurvature)
    assert isinstance(by_passes, FunctionalCurvature)
    assert by_passes.positive
    scale = max(by_rows.traces().values())
    found = by_passes.dense()
    for block, C in by_rows.dense().items():
        torch.testing.assert_close(found[block], C, rtol=0, atol=1e-12 * scale)


def smooth_hinge(output, batch):
    return F.softplus(1 + output - output.gather(1, batch[1][:, None])).square().sum(dim=1)


def concave(output, batch):
    return -output.square().sum(dim=1)


@pytest.mark.parametrize("route", ["rows", "passes"])
@pytest.mark.parametrize("loss", [smooth_hinge, concave])
def test_the_ggn_of_any_loss_function(loss, route, monkeypatch):
    """A loss that is concave in the output has products only."""
    p = problem("mlp")
    if route == "passes":
        monkeypatch.setattr(fitting, "MOST_OUTPUTS", 0)
    reference = DenseReference(p.model, p.names, loss, p.train, p.reference.w)
    influence = rf.Influence(rf.Task(p.model, loss=loss), "ggn", Dense(), damping=3.0, batch_size=6, progress=False)
    curvature = influence.fit(p.train)._fit.curvature
    assert isinstance(curvature, OuterCurvature) == (route == "rows" and loss is smooth_hinge)
    close(curvature.dense()["full"], reference.curvature("ggn"), 1e-11)
    assert influence.score(p.test).shape == (K, N)


@pytest.mark.parametrize("name", ["true_fisher", "mc_fisher"])
def test_a_loss_without_a_distribution_has_no_true_fisher(name):
    with pytest.raises(TaskError, match=r'smooth_hinge.*"ggn".*"fisher"'):
        rf.Influence(rf.Task(nn.Linear(4, 3).double(), loss=smooth_hinge), name, damping=0.1).fit(problem("mlp").train)
