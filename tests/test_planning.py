"""The plan: what is chosen, that it is refused where it does not fit, and that the budget holds."""

import pytest
import torch
from torch import nn

import refluence as rf
from refluence.errors import PlanError
from refluence.execution import format_bytes, parse_bytes
from refluence.planning import estimate, make_plan, solver_name
from refluence.solvers.cost import Workload


def workload(n, d, damping=0.1, device="cpu", q=1):
    """Layers of one position: an inner product costs some √d."""
    return Workload(
        n=n,
        tests=100,
        dimensions={"full": d},
        q=q,
        bytes_per_row=8.0 * d**0.5,
        feature_bytes_per_row=0.0 if q in (1, None) else 8.0 * q * d**0.5,
        inner_product_work=2 * d**0.5,
        gradient_seconds=1e-5,
        product_work=n * (6.0 * d if q is None else 2.0 * d + (q - 1) * d**0.5),
        itemsize=4,
        batch_size=256,
        device=torch.device(device),
        damping=damping,
    )


@pytest.mark.parametrize(
    ("n", "d", "solver"),
    [
        (5_000, 109_386, "Gram"),  # few examples, many parameters
        (60_000, 600, "Dense"),  # many examples, few parameters
        (1_000_000, 5_000_000, "Sketched"),  # many of both
    ],
)
def test_auto_takes_the_side_that_is_smaller(n, d, solver):
    plan = make_plan(workload(n, d), "fisher", "auto", 64 << 30)
    assert plan.solver.startswith(solver)
    assert len(plan.alternatives) == 2
    assert plan.reason


def test_auto_takes_a_sketch_where_nothing_exact_fits():
    plan = make_plan(workload(20_000, 200_000), "fisher", "auto", 2 << 30)
    assert plan.solver.startswith("Sketched")
    assert "memory" in plan.reason
    assert plan.fits


@pytest.mark.parametrize(
    ("curvature", "q", "memory", "solver"),
    [
        ("fisher", 1, 64 << 30, "Gram"),
        ("mc_fisher", 2, 64 << 30, "Gram"),
        ("ggn", 10, 64 << 30, "ConjugateGradient"),  # 5,000 rows of 10 outputs make a Gram matrix too dear
        ("true_fisher", 1, 64 << 30, "Gram"),
        ("ggn", None, 64 << 30, "ConjugateGradient"),  # outputs beyond what can be held
        ("hessian", None, 64 << 30, "ConjugateGradient"),
    ],
)
def test_auto_on_each_curvature(curvature, q, memory, solver):
    plan = make_plan(workload(5_000, 109_386, q=q), curvature, "auto", memory)
    kinds = {estimate.name.split("(")[0] for estimate in (plan.chosen, *plan.alternatives)}
    assert plan.fits
    assert plan.solver.startswith((solver, "Sketched"))
    assert solver in kinds
    assert ("ConjugateGradient" in kinds) == (curvature not in ("fisher", "mc_fisher"))
    assert ("Gram" in kinds) == (curvature != "hessian")


@pytest.mark.parametrize("curvature", ["fisher", "ggn", "hessian", "true_fisher", "mc_fisher"])
def test_auto_is_exact_on_a_small_problem_of_every_curvature(curvature):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = (torch.randn(40, 3).double(), torch.randint(0, 3, (40,)))
    influence = rf.Influence(rf.Task(model), curvature, damping=0.5, progress=False)
    plan = influence.plan_for(data)
    assert plan.solver in ("Gram", "Dense", "ConjugateGradient")
    influence.fit(data)
    dense = rf.Influence(rf.Task(model), curvature, rf.solvers.Dense(), damping=0.5, progress=False).fit(data)
    torch.testing.assert_close(influence.score(data).values, dense.score(data).values, rtol=1e-4, atol=1e-5)


def test_a_gram_matrix_of_a_ggn_that_does_not_fit_is_refused_with_what_would():
    model = nn.Linear(5, 8)
    data = (torch.randn(1_500, 5), torch.randint(0, 8, (1_500,)))
    influence = rf.Influence(rf.Task(model), "ggn", rf.solvers.Gram(), execution=rf.Execution(memory="200MB"))
    # 12,000 rows: 24 bytes times their square.
    with pytest.raises(PlanError, match=r"solver Gram needs 3\.\d GB but 200\.0 MB may be used: .*(Dense|Conjugate)"):
        influence.fit(data)
    rf.Influence(rf.Task(model), solver=rf.solvers.Gram(), execution=rf.Execution(memory="200MB"), progress=False).fit(
        data
    )


@pytest.mark.parametrize("solver", [rf.solvers.Gram(), rf.solvers.HarmonicMean(), rf.solvers.Kfac()])
def test_what_needs_rows_is_refused_on_a_curvature_without(solver):
    data = (torch.randn(20, 2), torch.randint(0, 2, (20,)))
    with pytest.raises(PlanError, match="rows"):
        rf.Influence(rf.Task(nn.Linear(2, 2)), "hessian", solver, damping=0.1).fit(data)


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        (rf.solvers.Gram(), "Gram"),
        (rf.solvers.ConjugateGradient(), "ConjugateGradient"),
        (rf.solvers.ConjugateGradient(rtol=1e-3, block=False), "ConjugateGradient(rtol=0.001, block=False)"),
        (rf.solvers.Nystroem(7), "Nystroem(7)"),
        (rf.solvers.Nystroem(7, seed=2), "Nystroem(7, seed=2)"),
        (rf.solvers.Arnoldi(rank=7, complement=False), "Arnoldi(7, complement=False)"),
        (rf.solvers.Ekfac(update_eigenvalues=False), "Ekfac(update_eigenvalues=False)"),
    ],
)
def test_a_solver_is_named_with_the_settings_that_are_not_its_defaults(solver, name):
    assert solver_name(solver) == name


def test_the_name_of_a_sketched_solver_has_its_sketch():
    assert "SJLT(m=64" in solver_name(rf.solvers.Sketched(rf.sketches.SJLT(64)))


def test_the_choice_does_not_depend_on_measured_times(monkeypatch):
    chosen = set()
    for rate in (1e7, 1e13):
        monkeypatch.setattr("refluence.planning.multiply_adds_per_second", lambda device, rate=rate: rate)
        chosen.add(make_plan(workload(3_000, 2_500), "fisher", "auto", 64 << 30).solver)
    assert len(chosen) == 1


def test_the_summary_says_what_was_chosen_and_what_else_there_is():
    text = make_plan(workload(5_000, 109_386), "fisher", "auto", 8 << 30).summary()
    for word in ("Gram", "n = 5,000", "d = 109,386", "memory", "time", "Dense", "Sketched"):
        assert word in text


def test_a_plan_that_does_not_fit_is_refused_with_what_would():
    model = nn.Linear(5, 3)
    data = (torch.randn(2_000, 5), torch.randint(0, 3, (2_000,)))
    influence = rf.Influence(rf.Task(model), solver=rf.solvers.Gram(), execution=rf.Execution(memory="60MB"))
    with pytest.raises(PlanError, match=r"solver Gram needs .* but 60.0 MB may be used: .*Dense"):
        influence.fit(data)
    assert not influence.plan_for(data).fits


@pytest.mark.parametrize("solver", ["gram", rf.sketches.SJLT(8), 3])
def test_what_is_no_solver_is_refused(solver):
    with pytest.raises(Exception, match="solver"):
        rf.Influence(rf.Task(nn.Linear(2, 2)), solver=solver).fit((torch.randn(4, 2), torch.zeros(4, dtype=torch.long)))


def test_kept_gradients_stay_within_the_budget_and_the_scores_are_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 150), nn.Tanh(), nn.Linear(150, 3)).double()
    train = (torch.randn(300, 200).double(), torch.randint(0, 3, (300,)))
    test = (torch.randn(9, 200).double(), torch.randint(0, 3, (9,)))
    task = rf.Task(model)
    free = rf.Influence(task, solver=rf.solvers.Gram(), damping=1e-2, batch_size=32).fit(train)
    needed = estimate(rf.solvers.Gram(), free.plan.workload, 1 << 40)
    tight = int(needed.memory - 0.7 * needed.kept)
    small = rf.Influence(
        task, solver=rf.solvers.Gram(), damping=1e-2, batch_size=32, execution=rf.Execution(memory=tight)
    ).fit(train)
    assert small.plan.chosen.kept < 0.5 * needed.kept
    assert small.plan.memory <= tight
    torch.testing.assert_close(small.score(test).values, free.score(test).values, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(small.self_influence(), free.self_influence(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("text", "count"), [("8GB", 8 * 10**9), ("512 MiB", 512 << 20), (77, 77), ("1.5kb", 1500)])
def test_sizes_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "lots", "8 apples", "-3GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(PlanError, match="memory"):
        rf.Execution(memory=text)


def test_sizes_are_written():
    assert [format_bytes(count) for count in (12, 1_500, 2e9)] == ["12 B", "1.5 KB", "2.0 GB"]
