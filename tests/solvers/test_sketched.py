"""Sketched scores are the published formula with the sketch's own matrix; corrected ones are unbiased for the exact."""

import pytest
import torch
from torch import nn

import refluence as rf
from refluence.solvers.sketched import block_sketches
from support.reference import columns_of, curvature, loop_gradients, scores

N, K = 30, 6


class Problem:
    def __init__(self):
        generator = torch.Generator().manual_seed(7)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)).double()
        for parameter in self.model.parameters():
            parameter.data = normal(*parameter.shape)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.train = normal(N, 4), torch.randint(3, (N,), generator=generator)
        self.test = normal(K, 4), torch.randint(3, (K,), generator=generator)
        self.G, self.V = (self.gradients(data) for data in (self.train, self.test))
        self.weights = torch.rand(N, generator=generator, dtype=torch.float64) * 2
        self.weights[::7] = 0

    def gradients(self, data):
        def loss(model, batch):
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

        return loop_gradients(self.model, loss, self.names, data)

    def influence(self, sketch, corrected, weights=None, l2=0.0, **options):
        solver = rf.solvers.Sketched(sketch, corrected=corrected)
        task = rf.Task(self.model, l2=l2)
        return rf.Influence(task, solver=solver, **{"damping": 1e-2, **options}).fit(self.train, weights=weights)


@pytest.fixture(scope="module")
def problem():
    return Problem()


SKETCHES = {
    "gaussian": lambda m: rf.sketches.Gaussian(m, seed=3),
    "rademacher": lambda m: rf.sketches.Rademacher(m, seed=3),
    "sjlt": lambda m: rf.sketches.SJLT(m, seed=3),
    "sjlt of four nonzeros": lambda m: rf.sketches.SJLT(m, nonzeros=4, seed=3),
}
sketches = pytest.mark.parametrize("kind", SKETCHES)
# the m×m side is kept for m ≤ n, the n×n side beyond
sizes = pytest.mark.parametrize("m", [12, 28, 32, 64])


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))


@sketches
@sizes
def test_uncorrected_scores_are_the_published_formula(problem, kind, m):
    sketch = SKETCHES[kind](m)
    P = sketch.matrix(problem.G.shape[1])
    influence = problem.influence(sketch, corrected=False, batch_size=11)
    for damping in (0.1, 1e-2, 1e-3):
        found = influence.at(damping).score(problem.test)
        assert_equal(found.values, scores(problem.V @ P.T, problem.G @ P.T, damping))


@sketches
@sizes
def test_corrected_scores_are_the_formula_at_the_corrected_damping(problem, kind, m):
    sketch, weights = SKETCHES[kind](m), problem.weights
    P = sketch.matrix(problem.G.shape[1])
    influence = problem.influence(sketch, corrected=True, weights=weights, l2=0.03, damping=0.12, batch_size=11)
    spectrum = torch.linalg.eigvalsh(P @ curvature(problem.G, weights) @ P.T).clamp(min=0)
    mu = rf.theory.corrected_damping(spectrum, m, 0.15)
    assert 0 < mu < 0.15
    assert_equal(influence.score(problem.test).values, scores(problem.V @ P.T, problem.G @ P.T, mu, weights))
    own = influence.self_influence()
    assert_equal(own, scores(problem.G @ P.T, problem.G @ P.T, mu, weights).diagonal())
    assert float(own.sum()) == pytest.approx(N * influence.effective_dimension, rel=1e-8)


@pytest.mark.parametrize("corrected", [False, True])
def test_each_block_has_a_sketch_of_its_own(problem, corrected):
    m = 16
    influence = problem.influence(rf.sketches.Gaussian(m, seed=3), corrected, blocks="module", damping=0.05)
    groups = {k: [n for n in problem.names if n.startswith(k)] for k in ("0", "2", "3")}
    sketches = block_sketches(rf.sketches.Gaussian(m, seed=3), list(groups))
    assert len({sketch.seed for sketch in sketches.values()}) == 3
    expected = torch.zeros(K, N, dtype=torch.float64)
    for k, columns in zip(groups, columns_of(problem.model, problem.names, groups.values()), strict=True):
        G, V = problem.G[:, columns], problem.V[:, columns]
        P = sketches[k].matrix(len(columns))
        spectrum = torch.linalg.eigvalsh(P @ curvature(G) @ P.T).clamp(min=0)
        mu = rf.theory.corrected_damping(spectrum, m, 0.05) if corrected else 0.05
        expected += scores(V @ P.T, G @ P.T, mu)
    assert_equal(influence.score(problem.test).values, expected)


def test_scores_do_not_depend_on_the_batches(problem):
    sketch = rf.sketches.SJLT(16, seed=3)
    whole, split = (
        problem.influence(sketch, True, damping=0.1, batch_size=b).score(problem.test).values for b in (N, 7)
    )
    assert_equal(split, whole)


def test_the_corrected_mean_over_sketches_is_the_exact_score_and_the_uncorrected_one_is_not(problem):
    """200 Gaussian sketches. The correction is exact in the limit of large sizes; m = 28 is close to it."""
    G, V, kappa, m, trials = problem.G, problem.V, 0.02, 28, 200
    exact = scores(V, G, kappa)
    values = {True: [], False: []}
    wide = rf.sketches.Gaussian(m, seed=9).matrix(trials * G.shape[1])
    for P in wide.split(G.shape[1], dim=1):  # independent sketches of d columns
        GP, VP = G @ P.T, V @ P.T
        spectrum = torch.linalg.eigvalsh(curvature(GP)).clamp(min=0)
        values[True].append(scores(VP, GP, rf.theory.corrected_damping(spectrum, m, kappa)))
        values[False].append(scores(VP, GP, kappa))
    # Along the exact scores: one number a sketch, 1 where there is no bias.
    along = {c: torch.stack([(v * exact).sum() / exact.square().sum() for v in found]) for c, found in values.items()}
    bias = {c: float((ratios.mean() - 1).abs()) for c, ratios in along.items()}
    error = {c: float(ratios.std() / trials**0.5) for c, ratios in along.items()}
    assert bias[True] < 4 * error[True]
    assert bias[False] > 10 * error[False]


def test_a_damping_below_what_the_sketch_adds_is_refused_with_the_size_to_use(problem):
    sketch = rf.sketches.Gaussian(8, seed=3)
    P = sketch.matrix(problem.G.shape[1])
    own = float(1 / (1 / torch.linalg.eigvalsh(P @ curvature(problem.G) @ P.T)).mean())
    influence = problem.influence(sketch, True, damping=1.01 * own)
    influence.score(problem.test)
    with pytest.raises(rf.errors.RefluenceError, match=r"m = 8 .*Try m = \d+, or a larger damping"):
        influence.at(0.99 * own).score(problem.test)
    problem.influence(sketch, False, damping=0.01 * own).score(problem.test)


def test_without_damping_a_sketch_above_the_rank_is_singular(problem):
    with pytest.raises(rf.errors.PlanError, match=r"singular \(rank \d+ of 64\)"):
        problem.influence(rf.sketches.Gaussian(64), False, damping=0.0).score(problem.test)


@pytest.mark.parametrize("m", [16, 64])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("blocks", ["full", "module"])
def test_inverse_hvp_is_lifted_so_that_its_products_with_gradients_are_the_scores(problem, m, corrected, blocks):
    sketch = rf.sketches.SJLT(m, seed=3)
    influence = problem.influence(sketch, corrected, damping=0.1, batch_size=11, blocks=blocks)
    found = influence.inverse_hvp(problem.test)
    assert_equal(found @ problem.G.T, influence.score(problem.test).values)
    if blocks == "full":
        P = sketch.matrix(problem.G.shape[1])
        C = curvature(problem.G)
        values = torch.linalg.eigvalsh(P @ C @ P.T).clamp(min=0)
        mu = rf.theory.corrected_damping(values, m, 0.1) if corrected else 0.1
        assert_equal(found, torch.linalg.solve(P @ C @ P.T + mu * torch.eye(m, dtype=C.dtype), P @ problem.V.T).T @ P)


def test_relative_damping_takes_the_trace_of_the_gradients_and_not_of_their_sketch(problem):
    trace = float(curvature(problem.G).trace())
    influence = problem.influence(rf.sketches.SJLT(16), False, damping=rf.RelativeDamping(0.2))
    assert influence.damping == pytest.approx(0.2 * trace / problem.G.shape[1], rel=1e-10)


@pytest.mark.parametrize("blocks", ["full", "module"])
def test_an_effective_dimension_asked_of_a_corrected_sketch_is_the_one_that_it_has(problem, blocks):
    influence = problem.influence(rf.sketches.Gaussian(28), True, damping=rf.EffectiveDimension(5), blocks=blocks)
    assert influence.effective_dimension == pytest.approx(5, rel=1e-6)


def test_an_effective_dimension_above_the_sketch_is_refused(problem):
    with pytest.raises(rf.errors.RefluenceError, match="dimension"):
        problem.influence(rf.sketches.Gaussian(4), True, damping=rf.EffectiveDimension(5))


def test_the_scores_are_marked_as_approximate(problem):
    influence = problem.influence(rf.sketches.SJLT(16), True)
    assert not influence.exact
    assert problem.influence(rf.sketches.SJLT(16), True).score(problem.test).manifest["exact"] is False


def test_a_sketched_solver_needs_a_sketch():
    with pytest.raises((rf.errors.PlanError, TypeError), match="Sketched"):
        rf.solvers.Sketched(4096)
