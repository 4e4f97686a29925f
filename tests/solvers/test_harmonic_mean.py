"""DataInf: its own formula, formed densely as a mean of inverses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refluence.errors import PlanError
from refluence.solvers.harmonic_mean import HarmonicMean
from support.solving import K, N, Solving, assert_equal

DAMPINGS = (0.1, 1e-2, 1e-3)
dampings = pytest.mark.parametrize("damping", DAMPINGS)
problems = pytest.mark.parametrize(
    ("name", "q", "blocks", "weighted", "batch_size"),
    [
        ("fisher", 1, "full", False, N),
        ("fisher", 1, "full", True, 7),
        ("fisher", 1, "module", True, 4),
        ("fisher", 1, "parameter", False, 7),
        ("mc_fisher", 1, "full", False, 7),
        ("mc_fisher", 2, "full", True, 7),
        ("mc_fisher", 2, "full", False, N),
        ("mc_fisher", 3, "module", True, 4),
        ("mc_fisher", 3, "parameter", True, N),
    ],
)


def feature_rows(problem):
    """Block → (gradients of all items, example of each), from one batch after the other."""
    rows, examples = {}, []
    for start, blocks in problem.curvature.features:
        for block, part in blocks.items():
            rows.setdefault(block, []).append(part.dense().double())
        count = part.n // problem.curvature.q
        examples += [torch.arange(start, start + count)] * problem.curvature.q
    return {block: torch.cat(parts) for block, parts in rows.items()}, torch.cat(examples)


def inverses_of(problem, shifts):
    """The mean of (ω f fᵀ + μI)⁻¹, each inverted by itself."""
    rows, examples = feature_rows(problem)
    found = {}
    for block, F in rows.items():
        omega = problem.curvature.q * problem.w[examples]
        each = omega[:, None, None] * F[:, :, None] * F[:, None, :] + shifts[block] * torch.eye(F.shape[1]).double()
        found[block] = torch.linalg.inv(each).mean(dim=0)
    return found


@problems
@dampings
def test_every_form_is_the_mean_of_inverses(name, q, blocks, weighted, batch_size, damping):
    problem = Solving(name, blocks, weighted, batch_size, q=q)
    shifts = problem.shifts(damping)
    state = HarmonicMean().prepare(problem.curvature)
    inverses = inverses_of(problem, shifts)
    problem.check(state, inverses, shifts, 1e-7)


@problems
def test_the_items_are_those_of_the_curvature(name, q, blocks, weighted, batch_size):
    """The harmonic mean's items have the curvature as their arithmetic mean."""
    problem = Solving(name, blocks, weighted, batch_size, q=q)
    rows, examples = feature_rows(problem)
    for block, F in rows.items():
        assert_equal((F.T * (q * problem.w[examples])) @ F / len(F), problem.C[block])


@pytest.mark.parametrize(("name", "q"), [("fisher", 1), ("mc_fisher", 2)])
def test_with_many_examples_it_goes_through_solve_with_the_same_values(name, q):
    problem = Solving(name, "module", True, 64, q=q, n=400)
    shifts = problem.shifts(1e-2)
    state = HarmonicMean().prepare(problem.curvature)
    assert state._solving_is_cheaper(K)
    assert not HarmonicMean().prepare(Solving(name, "module", True, q=q).curvature)._solving_is_cheaper(K)
    by_solving = dict(state.scores(problem.tests, shifts))
    state._solving_is_cheaper = lambda tests: False
    for block, values in state.scores(problem.tests, shifts):
        assert_equal(by_solving[block], values)
    problem.check(state, inverses_of(problem, shifts), shifts, 1e-7)


@settings(max_examples=12, deadline=None)
@given(cut=st.integers(1, K - 1), batch_size=st.integers(1, 4))
def test_scores_do_not_depend_on_how_the_tests_are_cut(cut, batch_size):
    problem = Solving("mc_fisher", "module", True)
    shifts = problem.shifts(1e-2)
    state = HarmonicMean().prepare(problem.curvature)
    whole = dict(state.scores(problem.tests, shifts))
    parts = [dict(state.scores(problem.test_rows(a, b, batch_size), shifts)) for a, b in ((0, cut), (cut, K))]
    for block, values in whole.items():
        assert_equal(torch.cat([part[block] for part in parts]), values)


def test_scores_do_not_depend_on_the_batches_of_the_train_rows():
    shifts = Solving().shifts(1e-3)
    one, other = (Solving(weighted=True, batch_size=b) for b in (N, 3))
    for a, b in zip(*(HarmonicMean().prepare(p.curvature).scores(p.tests, shifts) for p in (one, other)), strict=True):
        assert_equal(a[1], b[1])


@pytest.mark.parametrize(("name", "q"), [("fisher", 1), ("mc_fisher", 2)])
def test_gradients_that_are_not_kept_give_the_same(name, q):
    problem = Solving(name, "module", True, q=q)
    shifts = problem.shifts(1e-2)
    for rows in {problem.curvature.rows, problem.curvature.features}:
        rows.memory, rows._kept, rows._fits = 0, None, False
    state = HarmonicMean().prepare(problem.curvature)
    assert not problem.curvature.rows.kept
    problem.check(state, inverses_of(problem, shifts), shifts, 1e-7)


def test_what_is_exported_restores_the_same_numbers_for_other_batches_too():
    one, other = (Solving("mc_fisher", "module", True, batch_size=b) for b in (7, 4))
    shifts = one.shifts(1e-2)
    exported = HarmonicMean().prepare(one.curvature).export()
    again = HarmonicMean().restore(other.curvature, exported)
    other.check(again, inverses_of(one, shifts), shifts, 1e-7)


def test_it_is_never_below_the_inverse_itself():
    problem = Solving()
    [H] = inverses_of(problem, problem.shifts(1e-2)).values()
    [C] = problem.C.values()
    assert torch.linalg.eigvalsh(H - torch.linalg.inv(C + 1e-2 * torch.eye(len(C)).double()))[0] > -1e-8


def test_with_one_example_it_is_exact():
    problem = Solving(n=1)
    shifts = problem.shifts(1e-2)
    [(block, C)] = problem.C.items()
    inverses = {block: torch.linalg.inv(C + shifts[block] * torch.eye(len(C)).double())}
    problem.check(HarmonicMean().prepare(problem.curvature), inverses, shifts, 1e-7)


@pytest.mark.parametrize("name", ["ggn", "true_fisher", "hessian"])
def test_other_curvatures_are_refused_with_those_that_do(name):
    with pytest.raises(PlanError, match=rf'"{name}" is not made of.*"fisher" or "mc_fisher"'):
        HarmonicMean().prepare(Solving(name).curvature)


def test_no_damping_is_an_error():
    problem = Solving()
    state = HarmonicMean().prepare(problem.curvature)
    none = dict.fromkeys(problem.groups, 0.0)
    for ask in (lambda: list(state.scores(problem.tests, none)), lambda: state.self_influence(none)):
        with pytest.raises(PlanError, match="damping > 0"):
            ask()


def test_in_float32_scores_are_those_of_float64_to_its_rounding():
    exact, low = Solving("mc_fisher"), Solving("mc_fisher", dtype=torch.float32)
    shifts = exact.shifts(1e-2)
    state = HarmonicMean().prepare(low.curvature)
    low.check(state, inverses_of(low, shifts), shifts, 1e-5)
