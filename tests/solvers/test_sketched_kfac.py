"""K-FAC and EK-FAC whose factors are sketched: the formula with P in full, and what a wide sketch keeps as it is."""

import pytest
import torch

import refluence as rf
from refluence.errors import PlanError
from refluence.solvers import ConjugateGradient, Ekfac, Kfac
from refluence.solvers.projection import block_sketches
from support.kronecker import DAMPINGS, OWN, Problem, check
from support.models import CASES
from support.solving import assert_equal

SKETCH = rf.sketches.Kronecker(3, 2, seed=4)
MODELS = {
    name: CASES[name]
    for name in (
        "linear",
        "linear on sequences",
        "conv2d stride leaving a margin",
        "embedding",
        "layer norm on sequences",
    )
} | OWN


def layer_inverses(problem, state, sharing, shift_of):
    """Layer → (its columns in the block, Pᵀ(PCPᵀ+μ)⁻¹P, the same of the squared inverse), from P as a matrix."""
    sketches = block_sketches(SKETCH, list(problem.groups))
    for layer, basis in zip(state.layers, state.bases, strict=True):
        names = problem.groups[layer.group]
        sizes = [problem.model.get_parameter(name).numel() for name in names]
        starts = dict(zip(names, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))
        index = torch.cat([starts[n] + torch.arange(problem.model.get_parameter(n).numel()) for n in layer.owner.names])
        shift = shift_of[layer.group]
        if basis.kind == "kronecker":
            matrices = [m for m in problem.capture.matrices(layer.group) if m.names == layer.owner.names]
            P = sketches[layer.group].on(matrices).matrix(sum(sizes), dtype=torch.float64)[:, index]
            C = P @ problem.kronecker(layer.owner, basis, False, sharing) @ P.T
        else:
            C = problem.exact[layer.group][index][:, index]
            C = C.diagonal().diag() if basis.kind == "diagonal" else C
            P = torch.eye(len(C)).double()
        inverse = torch.linalg.inv(C + shift * torch.eye(len(C)).double())
        yield layer.group, index, P.T @ inverse @ P, P.T @ inverse @ inverse @ P


def blockwise(problem, found):
    """(block → inverse, block → squared inverse), zero between the layers."""
    first = {g: torch.zeros_like(C) for g, C in problem.exact.items()}
    second = {g: torch.zeros_like(C) for g, C in problem.exact.items()}
    for group, index, inverse, squared in found:
        first[group][index[:, None], index] = inverse
        second[group][index[:, None], index] = squared
    return first, second


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_both_factors_projected(name):
    problem = Problem(MODELS[name], "fisher", blocks="full", weighted=True, batch_size=2)
    state = Kfac(sketch=SKETCH).prepare(problem.curvature)
    for damping in DAMPINGS:
        shifts = problem.shifts(damping)
        first, second = blockwise(problem, layer_inverses(problem, state, "expand", shifts))
        scores, own, _ = problem.expected(first)
        _, squared, _ = problem.expected(second)
        for block, values in state.scores(problem.tests, shifts):
            assert_equal(values, scores[block], 1e-7)
        assert_equal(state.self_influence(shifts), own, 1e-7)
        assert_equal(state.inverse_norms(shifts), squared * problem.w, 1e-7)
        vectors = {b: problem.V[b].T for b in problem.groups}
        for block, values in state.solve(vectors, shifts).values.items():
            assert_equal(values, first[block] @ vectors[block], 1e-7)


@pytest.mark.parametrize("curvature", ["ggn", "mc_fisher"])
@pytest.mark.parametrize("blocks", ["full", "module"])
@pytest.mark.parametrize("batch_size", [100, 3])
def test_several_rows_an_example_in_any_batches(curvature, blocks, batch_size):
    problem = Problem(CASES["linear"], curvature, blocks, True, batch_size)
    state = Kfac(sketch=SKETCH, sharing="reduce").prepare(problem.curvature)
    shifts = problem.shifts(1e-2)
    first, _ = blockwise(problem, layer_inverses(problem, state, "reduce", shifts))
    scores, own, _ = problem.expected(first)
    for block, values in state.scores(problem.tests, shifts):
        assert_equal(values, scores[block], 1e-7)
    assert_equal(state.self_influence(shifts), own, 1e-7)


@pytest.mark.parametrize("solver", [Kfac, Ekfac])
@pytest.mark.parametrize("name", ["linear", "attention", "convolutions", "tied tokens", "embedding"])
def test_factors_no_larger_than_the_sketch_are_kept(name, solver):
    problem = Problem(MODELS[name], "fisher", "module", True)
    wide = solver(sketch=rf.sketches.Kronecker(64, 64)).prepare(problem.curvature)
    state, _ = check(problem, solver(), (1e-2,))
    shifts = problem.shifts(1e-2)
    expected = dict(state.scores(problem.tests, shifts))
    if solver is Kfac:
        for block, values in wide.scores(problem.tests, shifts):
            assert_equal(values, expected[block], 1e-7)
        assert wide.effective_dimension(shifts) == pytest.approx(state.effective_dimension(shifts), rel=1e-7)
    # Eigenvectors of equal eigenvalues are not unique, and with them EK-FAC; its trace is.
    for block, trace in state.traces.items():
        assert wide.traces[block] == pytest.approx(trace, rel=1e-9)


def test_ekfac_has_the_mean_squares_in_the_sketched_basis():
    problem = Problem(CASES["linear"], "fisher", "module", True)
    state = Ekfac(sketch=SKETCH).prepare(problem.curvature)
    for layer, basis in zip(state.layers, state.bases, strict=True):
        rows = torch.cat([layer.of(blocks).dense() for _, blocks in problem.curvature.rows]).double()
        turned = basis.rows.T @ basis.matrices(rows) @ basis.columns
        expected = torch.einsum("n,nrc->rc", problem.w, turned.square()) / len(rows)
        assert basis.values.shape == (2, 3)
        torch.testing.assert_close(basis.values, expected, rtol=1e-9, atol=1e-12)


def test_a_layer_above_the_limit_has_factors_all_the_same():
    problem = Problem(CASES["linear"], "fisher", "module")
    without = Kfac(factor_limit=3).prepare(problem.curvature)
    state = Kfac(factor_limit=3, sketch=SKETCH).prepare(problem.curvature)
    assert without.diagnostics["kronecker layers"] == []
    assert state.diagnostics["kronecker layers"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_saved_state_gives_the_same_scores():
    problem = Problem(CASES["linear"], "fisher", "module", True)
    solver = Kfac(sketch=SKETCH)
    state = solver.prepare(problem.curvature)
    again = solver.restore(problem.curvature, state.export())
    shifts = problem.shifts(1e-2)
    for (_, found), (_, expected) in zip(
        again.scores(problem.tests, shifts), state.scores(problem.tests, shifts), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("solver", [Kfac, Ekfac])
def test_it_cannot_precondition_which_needs_all_directions(solver):
    ConjugateGradient(preconditioner=solver())
    with pytest.raises(PlanError, match=rf"{solver.__name__} cannot precondition.*singular"):
        ConjugateGradient(preconditioner=solver(sketch=SKETCH))


def test_a_saved_fit_keeps_the_sketch(tmp_path):
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
    model = torch.nn.Linear(4, 3).double()
    fitted = rf.Influence(rf.Task(model), solver=Kfac(sketch=SKETCH), damping=0.1, progress=False).fit((x, y))
    loaded = rf.Influence.load(fitted.save(tmp_path / "fit"), rf.Task(model))
    assert loaded.settings.solver == Kfac(sketch=SKETCH)
    torch.testing.assert_close(loaded.score((x, y)).values, fitted.score((x, y)).values, rtol=0, atol=0)


def test_other_sketches_are_refused():
    with pytest.raises(PlanError, match=r"Kfac: sketch must be a rf.sketches.Kronecker.*not SJLT.*Sketched"):
        Kfac(sketch=rf.sketches.SJLT(8))
