"""What is said of a solver's diagnostics."""

import pytest
import torch
from torch import nn

import refluence as rf
from refluence.report.diagnostics import findings
from refluence.report.facts import CURVATURES, SOLVERS, facts, grounds


def said(**diagnostics):
    return [(found.name, found.value, found.reading, found.caution) for found in findings(diagnostics)]


def test_nothing_is_said_of_nothing():
    assert said() == []
    assert said(method="block", products=4, residual=[], iterations=[], converged=0) == []
    assert said(negative_eigenvalues={"a": 0, "b": 0}) == []
    assert said(**{"kronecker layers": ["0.weight"], "dense blocks": [], "diagonal blocks": []}) == []


def test_the_largest_residual_with_the_most_steps():
    [found] = said(residual=[1e-7, 3e-7, 0.0], iterations=[3, 34, 0], converged=3)
    assert found == ("Relative residual", "3.0×10⁻⁷", "after 34 steps", False)


def test_what_did_not_converge_is_a_caution():
    [found] = said(residual=[1e-7, 3e-2], iterations=[3, 1000], converged=1)
    assert found[2:] == ("after 1,000 steps; 1 of 2 right-hand sides did not reach the tolerance", True)


def test_a_neumann_series_has_its_two_parts():
    [found] = said(residual=0.013, depth=1203, residual_bias=0.012, residual_noise=0.005)
    assert found == ("Relative residual", "0.013", "after 1,203 steps; 0.012 of it truncation, 0.0050 noise", False)


def test_negative_eigenvalues_are_a_caution_where_the_damping_leaves_them():
    [damped] = said(negative_eigenvalues={"a": 2, "b": 1})
    assert damped == ("Negative eigenvalues", "3", "made positive by l2 and damping", False)
    [left] = said(negative_eigenvalues={"a": 2, "b": 1}, negative_shifted={"b": 1})
    assert left == (
        "Negative eigenvalues", "3", "1 stay negative with the damping: scores need not be effects of a removal", True
    )  # fmt: skip


def test_layers_without_a_kronecker_form_are_named_up_to_some():
    [found] = said(**{"dense blocks": [f"{i}.bias" for i in range(9)], "diagonal blocks": ["out.weight"]})
    assert found[:2] == ("Without a Kronecker form", "10 parameters")
    assert found[2] == (
        "0.bias, 1.bias, 2.bias, 3.bias, 4.bias, 5.bias and 3 more taken whole; out.weight by the diagonal"
    )


def test_stored_gradients_are_counted_over_all_stores():
    store = {"store": "a", "rows_read": 0, "rows_made": 5000, "damaged": [], "rounding_error": {"full": 0.0}}
    assert said(store=store) == [("Store", "0 rows read", "5,000 made, in a", False)]
    other = {
        **store,
        "store": "b",
        "rows_read": 4000,
        "rows_made": 1000,
        "damaged": ["x"],
        "rounding_error": {"l": 2e-4},
    }
    [found] = said(store=[store, other, store])
    assert found[1:3] == (
        "4,000 rows read", "11,000 made, in a, b, 1 damaged file; stored with a rounding error of 2.0×10⁻⁴"
    )  # fmt: skip


def test_the_trace_that_a_rank_holds():
    assert said(rank={"a": 8}, captured_trace={"a": 0.83}) == [
        ("Rank", "8", "holds 83\N{NO-BREAK SPACE}% of the trace of the curvature", False)
    ]
    [found] = said(rank={"a": 8, "b": 4}, captured_trace={"a": 0.83, "b": 0.5})
    assert found[1:3] == ("12", "holds at least 50\N{NO-BREAK SPACE}% of the trace of the curvature")


# ---------------------------------------------------------------- as facts


def shown(curvature, solver, **options):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(14, 3, generator=generator), torch.randint(2, (14,), generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    options = {"damping": 0.1, "progress": False, **options}
    influence = rf.Influence(rf.Task(model), curvature, solver, **options).fit((x, y))
    scores = influence.score((x[:3], y[:3]))
    return {fact.name: fact for fact in (*facts(influence, scores), *grounds(influence))}


@pytest.mark.parametrize("curvature", CURVATURES)
def test_the_curvature_is_in_words(curvature):
    fact = shown(curvature, rf.solvers.Dense(), damping=1.0, samples=3)["Solver"]
    assert f"on the {CURVATURES[curvature].split(' (')[0]}" in fact.reading
    assert ("3 labels" in fact.reading) == (curvature == "mc_fisher")


def test_every_curvature_and_solver_has_words():
    from refluence.curvature.build import CURVATURES as NAMES

    assert set(CURVATURES) == set(NAMES)
    kinds = {name for name in rf.solvers.__all__ if isinstance(getattr(rf.solvers, name), type)}
    assert set(SOLVERS) == kinds - {"Solution", "Solver", "State"}


@pytest.mark.parametrize(
    ("curvature", "options", "most"),
    [
        ("fisher", {}, 14),  # examples
        ("mc_fisher", {"samples": 1}, 14),
        ("ggn", {}, 26),  # parameters; two rows of each example would be 28
        ("fisher", {"blocks": "module"}, 14 + 10),
    ],
)
def test_the_effective_dimension_has_the_bound_of_its_curvature(curvature, options, most):
    assert f"of at most {most}" in shown(curvature, rf.solvers.Dense(), **options)["Effective dimension"].reading


def test_exact_scores_are_good_and_unknown_errors_a_caution():
    exact = shown("ggn", rf.solvers.Dense())["Solver"]
    assert (exact.value, exact.tone) == ("Dense", "good")
    assert exact.reading == "the whole matrix, on the generalised Gauss–Newton matrix: exact for this damping"
    low_rank = shown("ggn", rf.solvers.Nystroem(8))["Solver"]
    assert (low_rank.tone, "certify measures how far off" in low_rank.reading) == ("caution", True)
    sketched = shown("ggn", rf.solvers.Sketched(rf.sketches.Gaussian(16)))["Solver"]
    assert (sketched.tone, sketched.reading.endswith("approximate, each score has a 95 % interval")) == ("plain", True)


def test_scores_solved_to_a_tolerance_say_to_which():
    found = shown("ggn", rf.solvers.ConjugateGradient(rtol=1e-4))
    assert (
        found["Solver"].reading
        == "conjugate gradients, on the generalised Gauss–Newton matrix: exact up to the relative residual"
    )
    assert found["Solver"].tone == found["Relative residual"].tone == "plain"


def test_sampled_labels_have_intervals_from_two_on():
    two, one = (shown("mc_fisher", rf.solvers.Gram(), samples=samples)["Solver"] for samples in (2, 1))
    assert "exact but for the sampled labels, each score has a 95 % interval" in two.reading
    assert one.tone == "caution"
    assert "draw two or more" in one.reading


@pytest.mark.filterwarnings("ignore:the damped hessian")
def test_an_indefinite_hessian_is_a_caution():
    fact = shown("hessian", rf.solvers.Dense(), damping=1e-5)["Negative eigenvalues"]
    assert fact.tone == "caution"
    assert "stay negative" in fact.reading
