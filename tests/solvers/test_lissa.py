"""LiSSA: the truncated series formed densely, its truncation, its noise, and its divergence."""

import pytest
import torch

from refluence.batches import Batches
from refluence.errors import PlanError, SolverError
from refluence.gradients.capture import Capture
from refluence.gradients.groups import parameter_groups
from refluence.gradients.rows import GradientRows
from refluence.gradients.selection import select_rows
from refluence.solvers.lissa import UNRELATED, Lissa
from support.models import CASES
from support.solving import K, N, Solving, assert_equal

DAMPINGS = (0.1, 1e-2, 1e-3)
dampings = pytest.mark.parametrize("damping", DAMPINGS)
problems = pytest.mark.parametrize(
    ("name", "blocks", "weighted", "batch_size"),
    [
        ("fisher", "full", False, N),
        ("fisher", "module", True, 7),
        ("mc_fisher", "full", True, 4),
        ("ggn", "parameter", True, 7),
        ("true_fisher", "module", False, N),
    ],
)


def series(A, scale, depth):
    """(1/scale) Σ_{t ≤ depth} (I − A/scale)ᵗ."""
    total = power = torch.eye(len(A)).double()
    for _ in range(depth):
        power = power @ (torch.eye(len(A)).double() - A / scale)
        total = total + power
    return total / scale


def damped(problem, shifts):
    return {b: C + shifts[b] * torch.eye(len(C)).double() for b, C in problem.C.items()}


# ---------------------------------------------------------------- all examples


@problems
@dampings
@pytest.mark.parametrize("depth", [0, 9])
def test_every_form_is_the_truncated_series(name, blocks, weighted, batch_size, damping, depth):
    problem = Solving(name, blocks, weighted, batch_size)
    shifts = problem.shifts(damping)
    scale = 1.2 * max(float(torch.linalg.matrix_norm(A, 2)) for A in damped(problem, shifts).values())
    state = Lissa(depth=depth, scale=scale).prepare(problem.curvature)
    inverses = {b: series(A, scale, depth) for b, A in damped(problem, shifts).items()}
    problem.check(state, inverses, shifts, 1e-8)


@problems
@pytest.mark.parametrize("damping", [0.1, 1e-2])
def test_by_default_no_component_misses_more_than_the_tolerance(name, blocks, weighted, batch_size, damping):
    problem = Solving(name, blocks, weighted, batch_size)
    shifts = problem.shifts(damping)
    state = Lissa(tolerance=0.2).prepare(problem.curvature)
    solution = state.solve({b: v.T for b, v in problem.V.items()}, shifts)
    for block, A in damped(problem, shifts).items():
        values, vectors = torch.linalg.eigh(A)
        right = vectors.T @ problem.V[block].T
        exact = right / values[:, None]
        short = (vectors.T @ solution.values[block] - exact).abs()
        assert (short <= 0.2 * exact.abs() * (1 + 1e-6) + 1e-9 * exact.abs().max()).all()
    joint = torch.cat([A @ solution.values[b] - problem.V[b].T for b, A in damped(problem, shifts).items()])
    expected = joint.norm(dim=0) / torch.cat([v.T for v in problem.V.values()]).norm(dim=0)
    assert_equal(solution.residual, expected)
    assert (expected <= 0.2).all()
    assert solution.converged.all()
    assert state.diagnostics["residual"] == pytest.approx(float(expected.max()))
    assert state.diagnostics["residual_bias"] == pytest.approx(float(expected.max()))
    assert state.diagnostics["residual_noise"] == 0.0


def test_a_small_tolerance_gives_the_inverse():
    problem = Solving("ggn", "module", True)
    shifts = problem.shifts(0.5)
    inverses = {b: torch.linalg.inv(A) for b, A in damped(problem, shifts).items()}
    problem.check(Lissa(tolerance=1e-5).prepare(problem.curvature), inverses, shifts, 1e-4)


def test_the_default_scale_is_the_largest_eigenvalue_from_above():
    problem = Solving("ggn", "module")
    shifts = problem.shifts(1e-2)
    state = Lissa().prepare(problem.curvature)
    for block, A in damped(problem, shifts).items():
        top = float(torch.linalg.eigvalsh(A)[-1])
        assert top * (1 - 1e-9) <= state.scale(block, shifts[block]) <= 1.05 * top


def test_more_right_hand_sides_than_parameters_zero_ones_and_none_that_depend_on_the_others():
    problem = Solving("ggn")
    shifts = problem.shifts(0.1)
    [block] = problem.groups
    V = torch.randn(len(problem.C[block]), 100, generator=torch.Generator().manual_seed(1)).double()
    V[:, 3] = 0
    state = Lissa(batch_size=5, depth=20).prepare(problem.curvature)
    whole = state.solve({block: V}, shifts)
    assert (whole.values[block][:, 3] == 0).all()
    assert whole.residual[3] == 0
    part = state.solve({block: V[:, 40:60].T.contiguous().T}, shifts)
    assert_equal(part.values[block], whole.values[block][:, 40:60])


# ---------------------------------------------------------------- divergence and indefinite curvature


def test_divergence_is_an_error_with_a_scale_that_works():
    problem = Solving("ggn", "module", True)
    shifts = problem.shifts(0.1)
    with pytest.raises(SolverError, match=r"diverges.*scale 0\.05.*scale of at least") as error:
        list(Lissa(scale=0.05, depth=500).prepare(problem.curvature).scores(problem.tests, shifts))
    scale = float(str(error.value).split("damping is ")[1].split(":")[0])
    state = Lissa(scale=scale, depth=400).prepare(problem.curvature)
    found = state.solve({b: v.T for b, v in problem.V.items()}, shifts).values
    for block, A in damped(problem, shifts).items():
        assert_equal(found[block], torch.linalg.inv(A) @ problem.V[block].T, 1e-3)


def test_divergence_on_batches_is_an_error_with_a_scale_that_works():
    problem = Solving("fisher")
    shifts = problem.shifts(0.1)
    with pytest.raises(SolverError, match="scale of at least") as error:
        list(Lissa(scale=0.05, depth=500, batch_size=3).prepare(problem.curvature).scores(problem.tests, shifts))
    scale = float(str(error.value).split("damping is ")[1].split(":")[0])
    state = Lissa(scale=scale, depth=300, batch_size=3).prepare(problem.curvature)
    assert all(torch.isfinite(values).all() for _, values in state.scores(problem.tests, shifts))


def test_the_hessian_where_it_is_positive_with_the_damping_and_not_else():
    problem = Solving("hessian", weighted=True)
    [block] = problem.groups
    lowest, top = (float(torch.linalg.eigvalsh(problem.C[block])[i]) for i in (0, -1))
    assert lowest < -1e-3
    enough = {block: 3 * -lowest}
    state = Lissa(tolerance=1e-3).prepare(problem.curvature)
    found = state.solve({block: problem.V[block].T}, enough)
    assert_equal(found.values[block], torch.linalg.inv(damped(problem, enough)[block]) @ problem.V[block].T, 1e-2)
    assert (found.residual <= 1e-3).all()
    with pytest.raises(SolverError, match=r"needs curvature \+ damping to be positive.*use a damping above") as error:
        state.self_influence({block: 0.5 * -lowest})
    named = float(str(error.value).split("damping above ")[1].split(",")[0])
    assert named == pytest.approx(-lowest, rel=1e-2)
    with pytest.raises(SolverError, match="no scale works below 0"):
        Lissa(scale=top, depth=20_000).prepare(problem.curvature).solve(
            {block: problem.V[block].T}, {block: 0.5 * -lowest}
        )


def test_a_singular_curvature_without_damping_is_an_error():
    problem = Solving("fisher")
    none = dict.fromkeys(problem.groups, 0.0)
    with pytest.raises(SolverError, match="damping above 0"):
        Lissa().prepare(problem.curvature).self_influence(none)


def test_a_depth_that_would_never_end_is_an_error_with_other_ways():
    problem = Solving("fisher")
    with pytest.raises(SolverError, match="ConjugateGradient"):
        Lissa().prepare(problem.curvature).self_influence(problem.shifts(1e-6))


# ---------------------------------------------------------------- batches


def replayed(problem, solver, shifts, scales, repeat):
    """The recursion on dense matrices of the same batches, with the features one example after the other."""
    generator = torch.Generator().manual_seed(solver.seed + UNRELATED * repeat)
    features = {b: {} for b in problem.groups}
    for start, blocks in problem.curvature.features:
        for block, part in blocks.items():
            rows = part.dense().double()
            count = len(rows) // problem.curvature.q
            for i in range(count):
                features[block][start + i] = rows[i::count]
    step = {b: torch.eye(len(C)).double() for b, C in problem.C.items()}
    for _ in range(solver.depth):
        chosen = torch.randperm(N, generator=generator)[: solver.batch_size].tolist()
        for block in problem.groups:
            C = sum(problem.w[i] * features[block][i].T @ features[block][i] for i in chosen) / solver.batch_size
            A = C + shifts[block] * torch.eye(len(C)).double()
            step[block] = torch.eye(len(C)).double() + step[block] - A @ step[block] / scales[block]
    return {block: s / scales[block] for block, s in step.items()}


@problems
def test_on_batches_it_is_the_recursion_over_the_same_batches(name, blocks, weighted, batch_size):
    problem = Solving(name, blocks, weighted, batch_size)
    shifts = problem.shifts(1e-2)
    solver = Lissa(depth=6, batch_size=5, repeats=3, seed=4)
    state = solver.prepare(problem.curvature)
    scales = {b: state.scale(b, shift) for b, shift in shifts.items()}
    runs = [replayed(problem, solver, shifts, scales, repeat) for repeat in range(3)]
    inverses = {b: sum(run[b] for run in runs) / 3 for b in problem.groups}
    right = {b: v.T for b, v in problem.V.items()}
    solution = state.solve(right, shifts)
    for block, values in solution.values.items():
        assert_equal(values, inverses[block] @ right[block])
    for block, values in state.scores(problem.tests, shifts):
        assert_equal(values, problem.V[block] @ inverses[block].T @ problem.G[block].T * problem.w)
    parts = [torch.cat([A @ run[b] @ right[b] - right[b] for b, A in damped(problem, shifts).items()]) for run in runs]
    norms = torch.cat(list(right.values())).norm(dim=0)
    mean = sum(parts) / 3
    residual = mean.norm(dim=0) / norms
    noise = (sum((p - mean).square().sum(dim=0) for p in parts) / 6).sqrt() / norms
    assert_equal(solution.residual, residual)
    state.solve(right, shifts)
    assert state.diagnostics["residual_noise"] == pytest.approx(float(noise.max()))
    bias = (residual.square() - noise.square()).clamp(min=0).sqrt()
    assert state.diagnostics["residual_bias"] == pytest.approx(float(bias.max()))


def test_the_mean_over_repeats_is_that_of_all_examples():
    """z-test: a batch is unbiased at every step, and steps are independent."""
    problem = Solving("fisher", weighted=True)
    shifts = problem.shifts(0.1)
    [block] = problem.groups
    scale = Lissa(batch_size=4).prepare(problem.curvature).scale(block, shifts[block])
    right = {block: problem.V[block][:1].T}
    runs = torch.stack(
        [
            Lissa(depth=8, scale=scale, batch_size=4, seed=seed)
            .prepare(problem.curvature)
            .solve(right, shifts)
            .values[block][:, 0]
            for seed in range(60)
        ]
    )
    exact = series(damped(problem, shifts)[block], scale, 8) @ right[block][:, 0]
    z = (runs.mean(dim=0) - exact) / (runs.std(dim=0) / 60**0.5)
    assert z.abs().max() < 4.5


def test_a_batch_of_all_is_no_batch_and_repeats_lower_the_noise():
    problem = Solving("fisher", "module", True)
    shifts = problem.shifts(0.1)
    full, batch = (Lissa(depth=8, batch_size=size).prepare(problem.curvature) for size in (None, N))
    for one, other in zip(full.scores(problem.tests, shifts), batch.scores(problem.tests, shifts), strict=True):
        assert torch.equal(one[1], other[1])
    noise = []
    for repeats in (4, 36):
        state = Lissa(depth=8, batch_size=3, repeats=repeats).prepare(problem.curvature)
        state.solve({b: v.T for b, v in problem.V.items()}, shifts)
        noise.append(state.diagnostics["residual_noise"])
    assert noise[1] < 0.5 * noise[0]


@pytest.mark.parametrize("curvature", ["fisher", "ggn", "hessian"])
def test_products_of_some_rows_are_the_mean_of_their_own_curvatures(curvature):
    problem = Solving(curvature, "module", True)
    given = {b: v.T for b, v in problem.V.items()}
    each = [problem.curvature.sampled(torch.tensor([i]), given) for i in range(N)]
    whole, some = problem.curvature.matvec(given), problem.curvature.sampled(torch.tensor([5, 2, 5]), given)
    for block in given:
        assert_equal(torch.stack([part[block] for part in each]).mean(dim=0), whole[block])
        assert_equal(some[block], (each[5][block] * 2 + each[2][block]) / 3)


def test_batches_need_kept_rows():
    problem = Solving("fisher")
    rows = problem.curvature.rows
    rows.memory, rows._kept, rows._fits = 0, None, False
    state = Lissa(depth=4, batch_size=4).prepare(problem.curvature)
    with pytest.raises(PlanError, match="do not fit the memory"):
        state.solve({b: v.T for b, v in problem.V.items()}, problem.shifts(0.1))


@pytest.mark.parametrize("name", CASES)
def test_any_rows_can_be_selected_of_any_block(name):
    task = CASES[name].task()
    batch = CASES[name].build()[1]
    groups = parameter_groups(task.model, task.parameter_names(), "module")
    batches = Batches(batch)
    capture = Capture(task, task.model, groups, batches)
    rows = GradientRows(capture, batches, capture.loss, 1 << 30, progress=False)
    for _, blocks in rows:
        for block in blocks.values():
            chosen = torch.tensor([3, 0, 3])
            assert_equal(select_rows(block, chosen).dense(), block.dense()[chosen])


# ---------------------------------------------------------------- the state


@pytest.mark.parametrize("solver", [Lissa(tolerance=0.1), Lissa(depth=10, batch_size=4, repeats=2)])
def test_what_is_exported_restores_the_same_numbers(solver):
    problem = Solving("ggn", "module", True)
    shifts = problem.shifts(0.1)
    state = solver.prepare(problem.curvature)
    again = solver.restore(problem.curvature, state.export())
    for one, other in zip(state.scores(problem.tests, shifts), again.scores(problem.tests, shifts), strict=True):
        assert torch.equal(one[1], other[1])


def test_in_float32_scores_are_those_of_float64_to_its_rounding():
    exact, low = Solving("ggn"), Solving("ggn", dtype=torch.float32)
    shifts = exact.shifts(1e-1)
    solver = Lissa(depth=200, scale=4 * float(next(iter(exact.C.values())).trace()))
    scores = [dict(solver.prepare(p.curvature).scores(p.tests, shifts)) for p in (exact, low)]
    for block, values in scores[0].items():
        assert_equal(scores[1][block], values, 1e-3)


@pytest.mark.parametrize(
    "options",
    [{"depth": -1}, {"scale": 0.0}, {"repeats": 0}, {"batch_size": 0}, {"tolerance": 1.0}, {"repeats": 2}],
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(PlanError, match=next(iter(options))):
        Lissa(**options)


def test_it_says_that_it_cannot_precondition():
    assert Lissa.iterative
    assert K < N
