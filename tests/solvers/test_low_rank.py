"""Arnoldi and Nyström: the exact value of their own formulas, on curvatures of every kind and block structure."""

import warnings

import pytest
import torch

from refluence.curvature import Curvature
from refluence.errors import PlanError, SolverError
from refluence.linalg import nystroem_steps, ritz_steps, run_together
from refluence.linalg.nystroem import random_orthonormal
from refluence.solvers.arnoldi import Arnoldi
from refluence.solvers.nystroem import Nystroem
from support.solving import N, Solving, assert_equal

DAMPINGS = (0.1, 1e-2, 1e-3)
dampings = pytest.mark.parametrize("damping", DAMPINGS)
problems = pytest.mark.parametrize(
    ("name", "blocks", "weighted", "batch_size"),
    [
        ("fisher", "full", False, N),
        ("fisher", "full", True, 7),
        ("fisher", "module", False, 7),
        ("fisher", "parameter", True, 4),
        ("mc_fisher", "full", True, 7),
        ("ggn", "full", True, 7),
        ("ggn", "module", False, N),
        ("true_fisher", "parameter", True, 7),
    ],
)
COMPLEMENT = pytest.mark.parametrize("complement", [True, False], ids=["complement", "projection"])


def inverse_of(U, s, shift, complement):
    """U diag(1/(s+μ)) Uᵀ (+ (I − UUᵀ)/μ)."""
    inside = (U / (s + shift)) @ U.T
    if not complement or U.shape[0] == U.shape[1]:
        return inside
    return inside + (torch.eye(len(U)).double() - U @ U.T) / shift


def top_pairs(C, rank):
    values, vectors = torch.linalg.eigh(C)
    order = values.abs().argsort(descending=True)[:rank]
    return vectors[:, order], values[order]


@problems
@dampings
@pytest.mark.parametrize("rank", [1, 6])
@COMPLEMENT
def test_arnoldi_is_its_formula_of_the_largest_pairs(name, blocks, weighted, batch_size, damping, rank, complement):
    problem = Solving(name, blocks, weighted, batch_size)
    shifts = problem.shifts(damping)
    state = Arnoldi(rank, tolerance=1e-13, complement=complement).prepare(problem.curvature)
    inverses = {}
    for block, C in problem.C.items():
        U, s = top_pairs(C, rank)
        inverses[block] = inverse_of(U, s, shifts[block], complement)
        assert_equal(state.pairs[block].values, s)
    problem.check(state, inverses, shifts, 1e-6)


@problems
@dampings
def test_nystroem_is_the_formula_of_its_own_test_matrix(name, blocks, weighted, batch_size, damping):
    problem = Solving(name, blocks, weighted, batch_size)
    shifts = problem.shifts(damping)
    state = Nystroem(5, seed=2).prepare(problem.curvature)
    inverses = {}
    for block, C in problem.C.items():
        omega = random_orthonormal(len(C), min(5, len(C)), 2, torch.float64, "cpu")
        core = omega.T @ C @ omega
        low = C @ omega @ torch.linalg.pinv(core, hermitian=True) @ omega.T @ C
        inverses[block] = torch.linalg.inv(low + shifts[block] * torch.eye(len(C)).double())
    problem.check(state, inverses, shifts, 1e-7)


@pytest.mark.parametrize("solver", [Arnoldi(100, tolerance=1e-12), Arnoldi(100, complement=False), Nystroem(100)])
@dampings
@pytest.mark.parametrize("blocks", ["full", "module", "parameter"])
def test_at_full_rank_both_are_the_damped_inverse(solver, damping, blocks):
    problem = Solving("ggn", blocks, weighted=True)
    shifts = problem.shifts(damping)
    state = solver.prepare(problem.curvature)
    inverses = {b: torch.linalg.inv(C + shifts[b] * torch.eye(len(C)).double()) for b, C in problem.C.items()}
    problem.check(state, inverses, shifts, 1e-7)
    assert state.exact
    expected = sum(float((inverses[b] @ C).trace()) for b, C in problem.C.items())
    assert state.effective_dimension(shifts) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("solver", [Arnoldi(N, tolerance=1e-12), Nystroem(N)])
def test_a_rank_above_the_curvatures_own_is_exact(solver):
    """The Fisher of N examples has rank N < d at most."""
    problem = Solving("fisher", weighted=True)
    shifts = problem.shifts(1e-3)
    state = solver.prepare(problem.curvature)
    [(block, C)] = problem.C.items()
    problem.check(state, {block: torch.linalg.inv(C + shifts[block] * torch.eye(len(C)).double())}, shifts, 1e-6)
    assert state.diagnostics["captured_trace"][block] == pytest.approx(1.0)


# ---------------------------------------------------------------- indefinite and singular


class Given(Curvature):
    """Any matrices as a curvature."""

    def __init__(self, rows, matrices, positive=False):
        super().__init__("hessian", rows, None, positive)
        self.matrices, self.calls = matrices, 0

    def matvec(self, vectors):
        self.calls += 1
        return {block: self.matrices[block].to(v.dtype) @ v for block, v in vectors.items()}


def indefinite(problem, values):
    generator = torch.Generator().manual_seed(1)
    matrices = {}
    for block, C in problem.C.items():
        Q = torch.linalg.qr(torch.randn(len(C), len(C), generator=generator, dtype=torch.float64)).Q
        s = torch.zeros(len(C)).double()
        own = torch.tensor(values[: len(C)]).double()
        s[: len(own)] = own
        matrices[block] = (Q * s) @ Q.T
    return Given(problem.curvature.rows, matrices)


@dampings
@COMPLEMENT
def test_negative_eigenvalues_are_used_as_they_are_counted_and_warned_of(damping, complement):
    problem = Solving(blocks="module")
    problem.curvature = indefinite(problem, [3.0, -2.0, 1.0, -0.5])
    shifts = problem.shifts(damping)
    state = Arnoldi(4, tolerance=1e-12, complement=complement).prepare(problem.curvature)
    assert set(state.diagnostics["negative_eigenvalues"].values()) == {2}
    inverses = {b: inverse_of(*top_pairs(C, 4), shifts[b], complement) for b, C in problem.curvature.matrices.items()}
    with pytest.warns(RuntimeWarning, match=r"2 negative eigenvalues in block .*lowest -[12]"):
        problem.check(state, inverses, shifts, 1e-8)
    assert set(state.diagnostics["negative_shifted"].values()) == {2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state.self_influence(shifts)


def test_negative_eigenvalues_above_minus_the_damping_are_no_cause_for_a_warning():
    problem = Solving()
    state = Arnoldi(4).prepare(indefinite(problem, [3.0, -0.5, 1.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state.self_influence(problem.shifts(0.6))


def test_a_damping_that_meets_a_negative_eigenvalue_is_an_error():
    problem = Solving()
    state = Arnoldi(4, tolerance=1e-13).prepare(indefinite(problem, [3.0, -0.5, 1.0, 0.1]))
    with pytest.raises(SolverError, match=r"eigenvalue -0\.5.*singular at damping 0\.5"):
        state.self_influence(problem.shifts(0.5))


def test_the_hessian_itself_by_products():
    problem = Solving("hessian", blocks="module", weighted=True)
    shifts = problem.shifts(0.1)
    state = Arnoldi(5, tolerance=1e-12).prepare(problem.curvature)
    inverses = {b: inverse_of(*top_pairs(C, 5), shifts[b], True) for b, C in problem.C.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem.check(state, inverses, shifts, 1e-6)


def test_nystroem_refuses_what_may_be_indefinite_and_says_which_may_not():
    problem = Solving("hessian")
    with pytest.raises(PlanError, match=r'"hessian" need not be.*"ggn".*Arnoldi'):
        Nystroem(3).prepare(problem.curvature)


def test_no_damping_is_an_error_unless_all_directions_have_curvature():
    problem = Solving("ggn", blocks="module")
    none = dict.fromkeys(problem.groups, 0.0)
    for solver in (Nystroem(3), Arnoldi(3)):
        with pytest.raises(PlanError, match="damping > 0"):
            solver.prepare(problem.curvature).self_influence(none)
    regular = indefinite(problem, [1.0 + 0.1 * i for i in range(15)] + [3.0] * 5)
    state = Arnoldi(100, tolerance=1e-12).prepare(regular)
    problem.check(state, {b: torch.linalg.inv(C) for b, C in regular.matrices.items()}, none)
    with pytest.raises(SolverError, match="singular at damping 0"):
        Arnoldi(100).prepare(indefinite(problem, [1.0])).self_influence(none)


def test_the_published_projection_needs_no_damping():
    problem = Solving("ggn")
    none = dict.fromkeys(problem.groups, 0.0)
    state = Arnoldi(4, tolerance=1e-13, complement=False).prepare(problem.curvature)
    problem.check(state, {b: inverse_of(*top_pairs(C, 4), 0.0, False) for b, C in problem.C.items()}, none, 1e-6)


# ---------------------------------------------------------------- the state


@pytest.mark.parametrize("solver", [Arnoldi(4), Nystroem(4), Arnoldi(4, complement=False)])
def test_what_is_exported_restores_the_same_numbers(solver):
    problem = Solving("ggn", blocks="module", weighted=True)
    shifts = problem.shifts(1e-2)
    state = solver.prepare(problem.curvature)
    again = solver.restore(problem.curvature, {name: x.clone() for name, x in state.export().items()})
    for one, other in zip(state.scores(problem.tests, shifts), again.scores(problem.tests, shifts), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
    assert torch.equal(state.self_influence(shifts), again.self_influence(shifts))


@pytest.mark.parametrize("solver", [Arnoldi(4), Nystroem(4)])
def test_all_blocks_share_the_passes(solver):
    problem = Solving("fisher", blocks="parameter")
    given = Given(problem.curvature.rows, problem.C, positive=True)
    solver.prepare(given)
    alone = []
    for block, C in problem.C.items():
        calls = []

        def apply(v, C=C, calls=calls):
            calls.append(1)
            return {"only": C @ v["only"]}

        algorithm = {
            Nystroem: lambda d: nystroem_steps(d, 4, 0, torch.float64, "cpu"),
            Arnoldi: lambda d: ritz_steps(d, 4, 0, 1e-3, None, None, 8, torch.float64, "cpu"),
        }[type(solver)]
        run_together({"only": algorithm(len(problem.C[block]))}, apply)
        alone.append(len(calls))
    assert given.calls == max(alone) < sum(alone)


def test_in_float32_scores_are_those_of_float64_to_its_rounding():
    exact, low = Solving("ggn"), Solving("ggn", dtype=torch.float32)
    for solver in (Arnoldi(6, tolerance=1e-6), Nystroem(6)):
        shifts = exact.shifts(1e-2)
        scores = [dict(solver.prepare(p.curvature).scores(p.tests, shifts)) for p in (exact, low)]
        for block, values in scores[0].items():
            assert_equal(scores[1][block], values, 1e-3)


def test_diagnostics_say_what_was_found():
    problem = Solving("ggn", blocks="module")
    state = Arnoldi(5, tolerance=1e-8).prepare(problem.curvature)
    for block, C in problem.C.items():
        U, s = state.pairs[block].vectors, state.pairs[block].values
        assert state.diagnostics["largest_ritz_residual"][block] <= 1e-8 * float(s[0])
        assert float((C @ U - U * s).norm(dim=0).max()) <= 1e-7 * float(s[0])
        assert state.diagnostics["captured_trace"][block] == pytest.approx(float(s.sum() / C.trace()))
        assert state.diagnostics["rank"][block] == 5
        assert state.diagnostics["negative_eigenvalues"][block] == 0


@pytest.mark.parametrize("make", [lambda: Arnoldi(0), lambda: Nystroem(0), lambda: Arnoldi(3, tolerance=0.0)])
def test_impossible_settings_are_refused(make):
    with pytest.raises(PlanError, match=r"needs a rank|tolerance"):
        make()
