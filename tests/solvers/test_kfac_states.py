"""K-FAC and EK-FAC: layers without a Kronecker form, reports, restored and float32 states, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from refluence.errors import PlanError
from refluence.solvers import Ekfac, Kfac
from support.kronecker import OWN, Problem, check, made
from support.models import CASES
from support.solving import Solving, assert_equal


def test_what_has_no_kronecker_form_is_listed():
    problem = Problem(OWN["convolutions"])
    state = Ekfac().prepare(problem.curvature)
    assert state.diagnostics["kronecker layers"] == ["0.weight", "0.bias", "4.weight", "6.weight", "6.bias"]
    assert state.diagnostics["dense blocks"] == ["2.weight", "2.bias"]
    small = Ekfac(dense_limit=4)
    state, _ = check(problem, small)
    assert state.diagnostics["dense blocks"] == ["2.bias"]
    assert state.diagnostics["diagonal blocks"] == ["2.weight"]


@pytest.mark.parametrize("dense_limit", [1024, 5])
def test_a_layer_with_too_large_a_factor_falls_back(dense_limit):
    problem = Problem(CASES["linear"], weighted=True)
    state, _ = check(problem, Ekfac(factor_limit=5, dense_limit=dense_limit))
    kind = "dense blocks" if dense_limit == 1024 else "diagonal blocks"
    assert state.diagnostics[kind] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert state.diagnostics["kronecker layers"] == []


def test_tokens_have_a_diagonal_covariance_whatever_the_limit():
    problem = Problem(OWN["attention"], weighted=True)
    for sharing in ("expand", "reduce"):
        state, _ = check(problem, Ekfac(factor_limit=5, sharing=sharing))
        [tokens] = [
            b for layer, b in zip(state.layers, state.bases, strict=True) if layer.owner.weight == "tokens.weight"
        ]
        assert tokens.kind == "kronecker"
        assert tokens.rows is None


def test_tied_tokens_above_the_limit_fall_back():
    state, _ = check(Problem(OWN["tied tokens"], weighted=True), Ekfac(factor_limit=5))
    assert state.diagnostics["dense blocks"] == ["tokens.weight"]


def test_an_unused_layer_is_inverted_as_zero():
    state, _ = check(Problem(CASES["unused layer"], blocks="module"), Kfac())
    assert state.diagnostics["unused"] == ["unused.weight", "unused.bias"]


TRACED = [
    ("self-attention", "fisher"),
    ("self-attention", "ggn"),
    ("transformer encoder", "mc_fisher"),
    ("language model with ignored targets", "mc_fisher"),
    ("small ResNet", "fisher"),
    ("x @ W", "ggn"),
    ("addmm on flattened positions", "fisher"),
    ("bare parameters, 0-d too", "fisher"),
    ("experts by a mask", "fisher"),
    ("gru", "fisher"),
]


@pytest.mark.parametrize(("name", "curvature"), TRACED)
def test_the_trace_of_ekfac_is_that_of_the_curvature(name, curvature):
    problem = Problem(CASES[name], curvature, "module", True, 2)
    exact = problem.exact
    for sharing in ("expand", "reduce"):
        state = Ekfac(sharing=sharing).prepare(problem.curvature)
        listed = [
            name
            for kind in ("kronecker layers", "dense blocks", "diagonal blocks", "unused")
            for name in state.diagnostics[kind]
        ]
        assert sorted(listed) == sorted(name for names in problem.groups.values() for name in names)
        for group, C in exact.items():
            assert state.traces[group] == pytest.approx(float(C.trace()), rel=1e-9)
            assert state.spectra()[group].trace == pytest.approx(float(C.trace()), rel=1e-9)


def test_attention_projections_have_factors():
    state = Ekfac().prepare(Problem(CASES["self-attention"]).curvature)
    assert state.diagnostics["kronecker layers"] == [
        "attention.in_proj_weight",
        "attention.in_proj_bias",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
        "head.weight",
        "head.bias",
    ]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), width=st.integers(1, 7), n=st.integers(1, 7), bias=st.booleans(), q=st.integers(1, 3))
def test_a_random_network_is_its_formula_and_keeps_the_trace(seed, width, n, bias, q):
    def make():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, width, bias=bias), nn.Tanh(), nn.Linear(width, 3, bias=bias))
        return model, (torch.randn(n, 3).double(), torch.randint(3, (n,)))

    problem = Problem(made(make), "mc_fisher", "full", q=q)
    state, _ = check(problem, Ekfac(), (1e-2,), 1e-6)
    [C] = problem.exact.values()
    [trace] = state.traces.values()
    assert trace == pytest.approx(float(C.trace()), rel=1e-9, abs=1e-300)


# ---------------------------------------------------------------- states


@pytest.mark.parametrize("name", ["linear", "attention", "convolutions", "unused layer"])
@pytest.mark.parametrize("solver", [Kfac(), Ekfac()], ids=["Kfac", "Ekfac"])
def test_a_restored_state_gives_the_same_numbers(name, solver):
    problem = Problem({**CASES, **OWN}[name], "fisher", "module", True)
    state = solver.prepare(problem.curvature)
    again = solver.restore(problem.curvature, {k: v.clone() for k, v in state.export().items()})
    shifts = problem.shifts(1e-2)
    assert again.diagnostics == state.diagnostics
    assert again.traces == state.traces
    assert torch.equal(again.self_influence(shifts), state.self_influence(shifts))
    ours = dict(again.scores(problem.tests, shifts))
    for block, scores in state.scores(problem.tests, shifts):
        assert torch.equal(ours[block], scores)


@pytest.mark.parametrize("name", ["linear", "attention", "convolutions"])
def test_float32_is_close_to_float64(name):
    solver = Ekfac()
    double, single = (
        Problem({**CASES, **OWN}[name], "fisher", "module", True, dtype=d) for d in (torch.float64, torch.float32)
    )
    shifts = double.shifts(1e-2)
    state, other = solver.prepare(double.curvature), solver.prepare(single.curvature)
    assert other.product_dtype == torch.float32
    found = dict(other.scores(single.tests, shifts))
    for block, scores in state.scores(double.tests, shifts):
        assert_equal(found[block], scores, 1e-4)
    assert_equal(other.self_influence(shifts), state.self_influence(shifts), 1e-4)


def test_solving_leaves_the_vectors_as_they_are():
    problem = Problem(CASES["unused layer"])
    state = Ekfac(factor_limit=0, dense_limit=0).prepare(problem.curvature)
    vectors = {b: v.T.clone() for b, v in problem.V.items()}
    kept = {b: v.clone() for b, v in vectors.items()}
    state.solve(vectors, problem.shifts(0.1))
    assert all(torch.equal(v, kept[b]) for b, v in vectors.items())


def test_tests_in_several_tiles_have_the_same_scores(monkeypatch):
    problem = Problem(OWN["attention"], "fisher", "module", True)
    state, shifts = Ekfac().prepare(problem.curvature), problem.shifts(1e-2)
    whole = dict(state.scores(problem.tests, shifts))
    monkeypatch.setattr("refluence.solvers.kronecker_state.CHUNK_BYTES", 1)
    for block, scores in state.scores(problem.tests, shifts):
        assert_equal(scores, whole[block], 1e-12)


def test_wide_layers_whose_curvature_is_low_are_scored_under_the_staircase():
    """Widths above a strip, eigenvalues from far below ε·μ to far above μ, both sides the longer one."""

    def make(widths):
        def built():
            model = nn.Sequential(nn.Linear(widths[0], widths[1]), nn.Tanh(), nn.Linear(widths[1], 3))
            x = torch.randn(60, widths[0]).double() * torch.logspace(1, -9, widths[0]).double()
            return model, (x, torch.randint(3, (60,)))

        return built

    for widths in ((70, 40), (30, 90)):
        problem = Problem(made(make(widths)), "fisher", "module", batch_size=25)
        state = Ekfac().prepare(problem.curvature)
        for damping in (1.0, 1e-3):
            shifts = problem.shifts(damping)
            whole = {b: state.solve({b: v.T}, shifts).values[b].T for b, v in problem.V.items()}
            for block, scores in state.scores(problem.tests, shifts):
                assert_equal(scores, whole[block] @ problem.G[block].T, 1e-10)


@pytest.mark.parametrize("solver", [Kfac(), Ekfac()], ids=["Kfac", "Ekfac"])
@pytest.mark.parametrize("name", ["hessian", "ggn", "true_fisher"])
def test_a_curvature_without_rows_is_refused_with_those_that_have_some(solver, name):
    problem = Solving(name, q=None)
    with pytest.raises(PlanError, match=f'"{name}" .*use curvature "mc_fisher", "fisher", or "ggn" or "true_fisher"'):
        solver.prepare(problem.curvature)
    assert solver.needs_rows


def test_no_damping_is_refused_where_the_curvature_is_singular():
    problem = Problem(CASES["linear"])
    with pytest.raises(PlanError, match="singular"):
        Ekfac().prepare(problem.curvature).self_influence(problem.shifts(0.0))


@pytest.mark.parametrize("options", [{"sharing": "mean"}, {"dense_limit": -1}, {"factor_limit": -3}])
def test_wrong_options_are_named(options):
    [(name, value)] = options.items()
    for solver in (Kfac, Ekfac):
        with pytest.raises(PlanError, match=rf"{name} must .*{value}"):
            solver(**options)
