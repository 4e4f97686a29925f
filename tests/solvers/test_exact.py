"""The exact solvers give V (C + μI)⁻¹ (w G)ᵀ of dense float64 rows on all entries, and what follows from it."""

import pytest
import torch
from torch import nn

import refluence as rf
from support.reference import bilinear, columns_of, curvature, effective_dimension, loop_gradients, scores

N, K, RTOL = 23, 7, 1e-8
DAMPINGS = (0.1, 1e-2, 1e-3)
SOLVERS = {"gram": rf.solvers.Gram(), "dense": rf.solvers.Dense()}
PART = {"hidden": ["0.*", "1.*"], "output": ["4.weight", "4.bias"]}
BLOCKS = {"full": "full", "module": "module", "parameter": "parameter", "dict": PART}


class Problem:
    """A small network with d = 44 parameters on N train and K test rows, and its gradients by a loop."""

    def __init__(self, n=N, width=4):
        generator = torch.Generator().manual_seed(5)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.model = nn.Sequential(
            nn.Linear(3, width), nn.LayerNorm(width), nn.Tanh(), nn.Dropout(0.3), nn.Linear(width, 4)
        ).double()
        for parameter in self.model.parameters():
            parameter.data = normal(*parameter.shape)
        self.train = normal(n, 3), torch.randint(4, (n,), generator=generator)
        self.test = normal(K, 3), torch.randint(4, (K,), generator=generator)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.G, self.V = self.gradients(self.train), self.gradients(self.test)
        self.weights = torch.rand(n, generator=generator, dtype=torch.float64) * 2
        self.weights[::5] = 0

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def gradients(self, data, values=None):
        return loop_gradients(self.model, values or self.loss, self.names, data)

    def columns(self, blocks):
        groups = {
            "full": [self.names],
            "parameter": [[name] for name in self.names],
            "module": [[n for n in self.names if n.startswith(m)] for m in ("0", "1", "4")],
            "dict": [[n for n in self.names if n[0] in "01"], [n for n in self.names if n[0] == "4"]],
        }
        return columns_of(self.model, self.names, groups[blocks])

    def influence(self, solver="gram", weights=None, measurement=None, l2=0.0, **options):
        task = rf.Task(self.model, measurement=measurement, l2=l2)
        options = {"damping": 1e-2, **options}
        return rf.Influence(task, solver=SOLVERS.get(solver, solver), **options).fit(self.train, weights=weights)


@pytest.fixture(scope="module")
def problem():
    """Fewer examples than parameters."""
    return Problem()


solvers = pytest.mark.parametrize("solver", SOLVERS)
dampings = pytest.mark.parametrize("damping", DAMPINGS)


def assert_equal(found, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=RTOL * 1e-2 * scale)


# ---------------------------------------------------------------- scores


@solvers
@dampings
@pytest.mark.parametrize("batch_size", [N, 7])
def test_scores_equal_the_dense_solve_for_one_batch_and_for_uneven_ones(problem, solver, damping, batch_size):
    influence = problem.influence(solver, damping=damping, batch_size=batch_size)
    found = influence.score(problem.test)
    assert_equal(found.values, scores(problem.V, problem.G, damping))
    assert (found.target_damping, found.error, influence.damping) == (damping, None, damping)


@solvers
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("weighted", [False, True])
def test_scores_over_blocks_are_the_sum_of_the_blocks_own(problem, solver, blocks, weighted):
    weights = problem.weights if weighted else None
    influence = problem.influence(solver, weights, blocks=BLOCKS[blocks], batch_size=6)
    for damping in DAMPINGS:
        expected = scores(problem.V, problem.G, damping, weights, problem.columns(blocks))
        assert_equal(influence.at(damping).score(problem.test).values, expected)


@solvers
def test_l2_adds_to_the_damping_and_to_nothing_else(problem, solver):
    influence = problem.influence(solver, l2=0.05, damping=1e-2)
    assert_equal(influence.score(problem.test).values, scores(problem.V, problem.G, 0.06))
    assert influence.damping == 1e-2
    C = curvature(problem.G)
    assert influence.effective_dimension == pytest.approx(effective_dimension(C, 0.06), rel=RTOL)


@solvers
def test_weights_scale_the_curvature_and_the_train_side(problem, solver):
    influence = problem.influence(solver, problem.weights)
    values = influence.score(problem.test).values
    assert_equal(values, scores(problem.V, problem.G, 1e-2, problem.weights))
    assert (values[:, problem.weights == 0] == 0).all()


@solvers
def test_a_weight_of_two_is_the_example_twice(problem, solver):
    """With n kept, the curvature of a doubled row is that of the row given twice, up to n/(n+1)."""
    weights = torch.ones(N, dtype=torch.float64)
    weights[3] = 2
    twice = tuple(torch.cat([part, part[3:4]]) for part in problem.train)
    other = rf.Influence(rf.Task(problem.model), solver=SOLVERS[solver], damping=1e-2 * N / (N + 1)).fit(twice)
    doubled = other.score(problem.test).values * N / (N + 1)
    expected = doubled[:, :N].clone()
    expected[:, 3] += doubled[:, N]
    assert_equal(problem.influence(solver, weights).score(problem.test).values, expected)


def margin(model, batch):
    p = model(batch[0]).softmax(dim=1).gather(1, batch[1][:, None])[:, 0]
    return -(p / (1 - p)).log()


MEASUREMENTS = {
    "margin": ("margin", margin),
    "logit": ("logit", lambda model, batch: -model(batch[0]).gather(1, batch[1][:, None])[:, 0]),
    "function": (
        lambda output, batch: output.square().sum(dim=1),
        lambda model, batch: model(batch[0]).square().sum(dim=1),
    ),
}


@solvers
@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_a_measurement_replaces_the_test_gradients_only(problem, solver, measurement):
    given, values = MEASUREMENTS[measurement]
    V = problem.gradients(problem.test, values)
    found = problem.influence(solver, measurement=given).score(problem.test).values
    assert_equal(found, scores(V, problem.G, 1e-2))


@solvers
def test_scores_with_the_train_rows_as_tests_are_symmetric_with_self_influence_on_the_diagonal(problem, solver):
    influence = problem.influence(solver)
    values = influence.score(problem.train).values
    assert_equal(values, values.T)
    assert_equal(influence.self_influence(), values.diagonal())


@pytest.mark.parametrize("weighted", [False, True])
def test_identity_gives_gradient_dot_products(problem, weighted):
    weights = problem.weights if weighted else None
    influence = problem.influence(rf.solvers.Identity(), weights, batch_size=5)
    w = torch.ones(N, dtype=torch.float64) if weights is None else weights
    assert_equal(influence.score(problem.test).values, problem.V @ problem.G.T * w)
    assert_equal(influence.self_influence(), problem.G.square().sum(dim=1) * w)
    assert_equal(influence.inverse_hvp(problem.test), problem.V)


def test_identity_needs_no_damping(problem):
    influence = problem.influence(rf.solvers.Identity(), damping="auto")
    assert_equal(influence.score(problem.test).values, problem.V @ problem.G.T)


# ---------------------------------------------------------------- what follows from the solve


@solvers
@pytest.mark.parametrize("blocks", BLOCKS)
def test_self_influence_and_effective_dimension_equal_the_dense_ones(problem, solver, blocks):
    fitted = problem.influence(solver, blocks=BLOCKS[blocks])
    parts = [problem.G[:, columns] for columns in problem.columns(blocks)]
    for damping in DAMPINGS:
        influence = fitted.at(damping)
        own = influence.self_influence()
        assert_equal(own, sum(bilinear(G, G, curvature(G), damping).diagonal() for G in parts))
        dimension = sum(effective_dimension(curvature(G), damping) for G in parts)
        assert influence.effective_dimension == pytest.approx(dimension, rel=RTOL)
        assert float(own.sum()) == pytest.approx(N * influence.effective_dimension, rel=RTOL)
        assert float(own.mean()) == pytest.approx(influence.effective_dimension, rel=RTOL)


@solvers
def test_weighted_self_influence_still_sums_to_n_times_the_effective_dimension(problem, solver):
    influence = problem.influence(solver, problem.weights)
    assert float(influence.self_influence().sum()) == pytest.approx(N * influence.effective_dimension, rel=RTOL)
    C = curvature(problem.G, problem.weights)
    assert_equal(influence.self_influence(), bilinear(problem.G, problem.G, C, 1e-2).diagonal() * problem.weights)


@solvers
def test_the_effective_dimension_is_additive_over_blocks(problem, solver):
    whole = problem.influence(solver, blocks=PART).effective_dimension
    parts = 0.0
    for names in PART.values():
        task = rf.Task(problem.model, parameters=names)
        parts += rf.Influence(task, solver=SOLVERS[solver], damping=1e-2).fit(problem.train).effective_dimension
    assert whole == pytest.approx(parts, rel=RTOL)


@solvers
@pytest.mark.parametrize("damping", [0.1, 1e-3])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_inverse_hvp_equals_the_dense_solve_in_the_models_order_of_parameters(problem, solver, damping, blocks):
    found = problem.influence(solver, problem.weights, damping=damping, blocks=BLOCKS[blocks]).inverse_hvp(problem.test)
    expected = torch.zeros_like(problem.V)
    for columns in problem.columns(blocks):
        C = curvature(problem.G[:, columns], problem.weights)
        shifted = C + damping * torch.eye(len(C), dtype=C.dtype)
        expected[:, columns] = torch.linalg.solve(shifted, problem.V[:, columns].T).T
    assert_equal(found, expected)


@solvers
def test_blocks_given_in_another_order_keep_the_models_order_in_inverse_hvp(problem, solver):
    turned = {"output": ["4.bias", "4.weight"], "hidden": ["1.*", "0.*"]}
    assert_equal(
        problem.influence(solver, blocks=turned).inverse_hvp(problem.test),
        problem.influence(solver, blocks=PART).inverse_hvp(problem.test),
    )


@solvers
def test_scores_are_the_inverse_hvp_times_the_train_gradients(problem, solver):
    influence = problem.influence(solver)
    assert_equal(influence.inverse_hvp(problem.test) @ problem.G.T, influence.score(problem.test).values)


@solvers
def test_the_gradient_norm_is_that_of_the_training_objective(problem, solver):
    theta = torch.cat([p.detach().flatten() for p in problem.model.parameters()])
    found = problem.influence(solver, problem.weights, l2=0.05).gradient_norm
    expected = (problem.weights @ problem.G / N + 0.05 * theta).norm()
    assert found == pytest.approx(float(expected), rel=RTOL)


# ---------------------------------------------------------------- at, and a regular curvature without damping


@solvers
def test_at_equals_a_fresh_fit_without_another_pass_over_the_data(problem, solver):
    influence = problem.influence(solver, damping=0.1)
    passes = []
    influence._fit.rows.capture.gradients = lambda *arguments: passes.append(arguments)
    influence._fit.rows._kept = influence._fit.rows._kept or []
    others = [influence.at(damping) for damping in (1e-3, 0.05, 1e-2)]
    dimensions = [other.effective_dimension for other in others]
    assert passes == []
    assert influence.damping == 0.1
    for other, dimension in zip(others, dimensions, strict=True):
        fresh = problem.influence(solver, damping=other.damping)
        assert dimension == pytest.approx(fresh.effective_dimension, rel=RTOL)


@solvers
@pytest.mark.parametrize("how_many", [1, 4])
def test_scores_at_other_dampings_equal_the_dense_ones_by_cholesky_and_by_eigenvectors(problem, solver, how_many):
    influence = problem.influence(solver, damping=0.1)
    for damping in (0.1, 0.03, 1e-2, 1e-3)[:how_many]:
        assert_equal(influence.at(damping).score(problem.test).values, scores(problem.V, problem.G, damping))
    assert_equal(influence.score(problem.test).values, scores(problem.V, problem.G, 0.1))


@solvers
def test_zero_damping_on_a_singular_curvature_is_refused_with_its_rank(problem, solver):
    influence = problem.influence(solver)
    rank = int(torch.linalg.matrix_rank(problem.G))
    for use in (lambda i: i.score(problem.test), lambda i: i.effective_dimension, lambda i: i.self_influence()):
        with pytest.raises(rf.errors.PlanError, match=rf"singular \(rank {rank} of 44\).*damping > 0"):
            use(influence.at(0.0))


@pytest.fixture(scope="module")
def regular():
    """(task, train, test, G, V) with 21 parameters and 200 examples, whose curvature is regular."""
    generator = torch.Generator().manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    train, test = (torch.randn(n, 4, generator=generator, dtype=torch.float64).split([3, 1], dim=1) for n in (200, K))
    names = [name for name, _ in model.named_parameters()]
    G, V = (
        loop_gradients(model, lambda m, b: (m(b[0]) - b[1]).square().mean(dim=1), names, data) for data in (train, test)
    )
    assert torch.linalg.cond(curvature(G)) < 1e6
    return rf.Task(model, "mse"), train, test, G, V


@solvers
def test_zero_damping_on_a_regular_curvature_inverts_it(regular, solver):
    task, train, test, G, V = regular
    influence = rf.Influence(task, solver=SOLVERS[solver], damping=0.0).fit(train)
    expected = scores(V, G, 0.0)
    torch.testing.assert_close(
        influence.score(test).values, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max())
    )
    assert influence.effective_dimension == pytest.approx(21)


def test_inverse_hvp_without_damping_points_to_the_dense_solver(regular):
    task, train, test, G, V = regular
    with pytest.raises(rf.errors.PlanError, match="solver Dense at damping 0"):
        rf.Influence(task, solver=rf.solvers.Gram(), damping=0.0).fit(train).inverse_hvp(test)
    found = rf.Influence(task, solver=rf.solvers.Dense(), damping=0.0).fit(train).inverse_hvp(test)
    torch.testing.assert_close(found, torch.linalg.solve(curvature(G), V.T).T, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------- little memory


@pytest.mark.parametrize("memory", [0, 1_500, 4_000, 10**9])
@pytest.mark.parametrize("solver", ["gram", "dense", "identity"])
def test_gradients_that_do_not_fit_the_memory_give_the_same_numbers_in_several_passes(problem, solver, memory):
    from refluence.batches import Batches
    from refluence.curvature import OuterCurvature
    from refluence.gradients.capture import Capture
    from refluence.gradients.rows import GradientRows

    task = rf.Task(problem.model)
    capture = Capture(task, problem.model, {"full": tuple(problem.names)}, Batches(problem.train))
    rows = GradientRows(capture, Batches(problem.train, 3), capture.loss, memory, progress=False)
    tests = GradientRows(capture, Batches(problem.test, 2), capture.measurement, memory, progress=False)
    state = {**SOLVERS, "identity": rf.solvers.Identity()}[solver].prepare(OuterCurvature("fisher", rows, rows))
    [(_, values)] = list(state.scores(tests, {"full": 1e-2}))
    assert rows.kept == (memory == 10**9)
    exact = problem.V @ problem.G.T if solver == "identity" else scores(problem.V, problem.G, 1e-2)
    assert_equal(values, exact)


def test_a_small_memory_gives_the_same_scores_end_to_end(problem):
    plan = problem.influence("gram", batch_size=4).plan
    memory = int(plan.memory - 0.7 * plan.workload.n * plan.workload.bytes_per_row)
    influence = problem.influence("gram", batch_size=4, execution=rf.Execution(memory=memory))
    assert not influence._fit.rows.kept
    assert_equal(influence.score(problem.test).values, scores(problem.V, problem.G, 1e-2))
    assert_equal(influence.inverse_hvp(problem.test) @ problem.G.T, scores(problem.V, problem.G, 1e-2))


# ---------------------------------------------------------------- precision


def test_a_float64_attribution_of_a_float32_model_equals_that_of_its_float64_copy(problem):
    import copy

    single = copy.deepcopy(problem.model).float()
    data = tuple((x.float(), y) for x, y in (problem.train, problem.test))
    found = rf.Influence(rf.Task(single), solver=rf.solvers.Gram(), damping=1e-2, dtype=torch.float64).fit(data[0])
    values = found.score(data[1]).values
    assert values.dtype == torch.float64
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    double = copy.deepcopy(single).double()
    G, V = (loop_gradients(double, problem.loss, problem.names, (x.double(), y)) for x, y in data)
    assert_equal(values, scores(V, G, 1e-2))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-3), (torch.bfloat16, 0.5)])
def test_low_precision_models_give_scores_near_the_float64_ones(problem, dtype, rtol):
    """Rounding of the gradients is amplified by at most the condition of C + λI; only its size is held to here."""
    import copy

    model = copy.deepcopy(problem.model).to(dtype)
    (x, y), (tx, ty) = problem.train, problem.test
    influence = rf.Influence(rf.Task(model), solver=rf.solvers.Gram(), damping=0.1).fit((x.to(dtype), y))
    values = influence.score((tx.to(dtype), ty)).values.double()
    expected = scores(problem.V, problem.G, 0.1)
    assert (values - expected).norm() <= rtol * expected.norm()
