"""Standard errors of sketched scores are the formula of first order, in every form, and cover what they claim."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import refluence as rf
from refluence.columns import ColumnSums
from refluence.solvers.projected import ProjectedHere
from refluence.solvers.projection import block_sketches
from refluence.solvers.sketch_errors import has_error_formula, standard_errors
from refluence.solvers.sketched_state import SketchedDual, SketchedPrimal
from refluence.zoo import load_dataset
from support.reference import bilinear, curvature, loop_gradients, scores
from support.solving import K, N, Solving, assert_equal

SKETCHES = {
    "gaussian": lambda m: rf.sketches.Gaussian(m, seed=3),
    "rademacher": lambda m: rf.sketches.Rademacher(m, seed=3),
    "sjlt": lambda m: rf.sketches.SJLT(m, seed=3),
    "sjlt of four nonzeros": lambda m: rf.sketches.SJLT(m, nonzeros=4, seed=3),
}
sketches = pytest.mark.parametrize("kind", SKETCHES)
# the m×m side is kept for m ≤ n = 19, the n×n side beyond
sizes = pytest.mark.parametrize("m", [8, 16, 20, 48])


def target(spectrum, mu):
    """κ of the m eigenvalues at μ."""
    return 1 / float((1 / (spectrum + mu)).mean())


def errors_about(PV, PG, M, mu):
    """√(κ²/(mκ')·(s_ii s_jj + s_ij²)), κ' as the slope of κ(μ) between two near μ; and κ."""
    m = len(M)
    spectrum = torch.linalg.eigvalsh(M).clamp(min=0)
    step = 1e-4 * (mu + float(spectrum[0]))
    kappa, slope = target(spectrum, mu), (target(spectrum, mu + step) - target(spectrum, mu - step)) / (2 * step)
    square = torch.linalg.inv(M + mu * torch.eye(m, dtype=M.dtype))
    square = square @ square
    of_tests, of_train = ((X @ square * X).sum(dim=1) for X in (PV, PG))
    variance = of_tests[:, None] * of_train + (PV @ square @ PG.T).square()
    return (kappa**2 / (m * slope) * variance).sqrt(), kappa


def expected(given, sketch, shifts, corrected, train=None):
    """Block → (errors, κ); `train`: rows of n columns that combine the train gradients."""
    out = {}
    for block, part in block_sketches(sketch, list(given.groups)).items():
        G, V = given.G[block], given.V[block]
        P = part.matrix(G.shape[1])
        M = P @ curvature(G, given.w) @ P.T
        mu = shifts[block]
        if corrected:
            mu = rf.theory.corrected_damping(torch.linalg.eigvalsh(M).clamp(min=0), sketch.m, mu)
        rows = G * given.w[:, None]
        out[block] = errors_about(V @ P.T, (rows if train is None else train @ rows) @ P.T, M, mu)
    return out


def prepared(given, sketch, corrected=True):
    return rf.solvers.Sketched(sketch, corrected).prepare(given.curvature)


@sketches
@sizes
@pytest.mark.parametrize("weighted", [False, True])
def test_the_errors_of_all_pairs_are_the_formula(kind, m, weighted):
    given, sketch = Solving(weighted=weighted), SKETCHES[kind](m)
    for corrected, damping in itertools.product([True, False], [0.8, 0.3]):
        state = prepared(given, sketch, corrected)
        shifts = given.shifts(damping)
        [(block, errors)] = state.deviations(given.tests, shifts)
        (wanted, kappa) = expected(given, sketch, shifts, corrected)[block]
        assert errors.shape == (K, N)
        assert_equal(errors, wanted, 1e-6)
        assert state.targets(shifts)[block] == pytest.approx(kappa, rel=1e-9)
        if corrected:
            assert kappa == pytest.approx(shifts[block], rel=1e-9)


@pytest.mark.parametrize("name", ["ggn", "true_fisher", "mc_fisher"])
@pytest.mark.parametrize("q", ["own", None])
def test_curvatures_of_other_rows_and_of_products_have_errors_too(name, q):
    if name == "mc_fisher" and q is None:
        pytest.skip("the sampled Fisher has rows")
    given, sketch, shifts = Solving(name, q=q), rf.sketches.Gaussian(24, seed=3), {"full": 0.3}
    P = sketch.matrix(given.G["full"].shape[1])
    M = P @ given.C["full"] @ P.T
    mu = rf.theory.corrected_damping(torch.linalg.eigvalsh(M).clamp(min=0), 24, 0.3)
    wanted, _ = errors_about(given.V["full"] @ P.T, given.G["full"] @ P.T, M, mu)
    [(_, errors)] = prepared(given, sketch).deviations(given.tests, shifts)
    assert_equal(errors, wanted, 1e-6)


@pytest.mark.parametrize("m", [12, 48])
def test_every_block_has_its_own_error(m):
    given, sketch = Solving(blocks="parameter", weighted=True), rf.sketches.SJLT(m, seed=3)
    shifts = given.shifts(0.3)
    found = dict(prepared(given, sketch).deviations(given.tests, shifts))
    wanted = expected(given, sketch, shifts, True)
    assert list(found) == list(wanted)
    for block, (errors, _) in wanted.items():
        assert_equal(found[block], errors, 1e-6)


@pytest.mark.parametrize("m", [12, 48])
def test_a_sum_of_columns_has_the_error_of_the_summed_gradients(m):
    given, sketch = Solving(blocks="module", weighted=True), rf.sketches.Rademacher(m, seed=3)
    codes = torch.arange(N) % 4
    factors = torch.linspace(-1, 2, N, dtype=torch.float64)
    sums = ColumnSums(factors, codes, 4)
    shifts = given.shifts(0.3)
    rows = torch.zeros(4, N, dtype=torch.float64)
    rows[codes, torch.arange(N)] = factors
    found = dict(prepared(given, sketch).deviations(given.tests, shifts, sums))
    for block, (errors, _) in expected(given, sketch, shifts, True, rows).items():
        assert found[block].shape == (K, 4)
        assert_equal(found[block], errors, 1e-6)


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_both_sides_give_the_same(seed, weighted, corrected):
    """The m×m and the n×n matrix of one sketch: scores, errors, errors of sums, norms."""
    given, m = Solving(weighted=weighted), 40
    wide = prepared(given, rf.sketches.Gaussian(m, seed=seed), corrected)
    rows = wide.projected.rows()["full"]
    moment = (rows * given.w[:, None]).T @ rows / N
    narrow = SketchedPrimal(wide.sketch, corrected, given.curvature, {"full": moment}, wide.projected)
    assert isinstance(wide, SketchedDual)
    sums = ColumnSums(torch.ones(N, dtype=torch.float64), torch.arange(N) % 3, 3)
    for damping in (0.3, 1e-2):
        shifts = {"full": damping}
        for options in ((), (sums,)):
            assert_equal(
                dict(wide.deviations(given.tests, shifts, *options))["full"],
                dict(narrow.deviations(given.tests, shifts, *options))["full"],
            )
        assert_equal(dict(wide.scores(given.tests, shifts))["full"], dict(narrow.scores(given.tests, shifts))["full"])
        assert_equal(wide.inverse_norms(shifts), narrow.inverse_norms(shifts))
        assert wide.targets(shifts) == pytest.approx(narrow.targets(shifts), rel=1e-9)


def test_errors_do_not_depend_on_the_batches_of_train_or_test():
    sketch, shifts = rf.sketches.SJLT(16, seed=3), {"full": 0.2}
    whole = Solving(batch_size=N)
    [(_, expected_errors)] = prepared(whole, sketch).deviations(whole.tests, shifts)
    for size in (1, 5):
        split = Solving(batch_size=size)
        state = prepared(split, sketch)
        [(_, errors)] = state.deviations(split.test_rows(0, K, size), shifts)
        assert_equal(errors, expected_errors, 1e-10)
        [(_, first)] = state.deviations(split.test_rows(0, 2, 2), shifts)
        assert_equal(first, expected_errors[:2], 1e-10)


@pytest.mark.parametrize("m", [16, 48])
def test_tests_are_projected_once_and_forgotten(m, monkeypatch):
    from refluence.solvers import sketched_state

    given = Solving()
    state = prepared(given, rf.sketches.Gaussian(m))
    asked = []
    original = sketched_state.project_rows

    def counted(rows, sketches):
        asked.append(rows)
        return original(rows, sketches)

    monkeypatch.setattr(sketched_state, "project_rows", counted)
    tests = given.test_rows(0, K, 4)
    values = dict(state.scores(tests, {"full": 0.2}))["full"].clone()
    dict(state.deviations(tests, {"full": 0.2}))
    dict(state.deviations(tests, {"full": 0.4}))
    assert len(asked) == 1
    assert_equal(dict(state.scores(tests, {"full": 0.2}))["full"], values, 1e-10)
    asked.clear()
    del tests
    assert len(state._tests) == 0


def test_the_norm_of_a_solved_test_keeps_its_digits_where_it_lies_in_the_range():
    """z among the rows, σ/μ = 10⁹: ‖z‖² − Σ would have no digit of s(z, z) = ‖z‖²/(σ+μ)² left."""
    given = Solving(n=4)
    rows = 2 * torch.linalg.qr(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).double())[0].T
    sketch, mu = rf.sketches.Gaussian(40), 1e-9
    held = ProjectedHere({"full": rows}, given.curvature)
    state = SketchedDual(sketch, False, given.curvature, {"full": rows @ rows.T / 4}, held)
    cross, of_tests = state._squared_with_tests("full", mu, rows.clone())
    torch.testing.assert_close(of_tests, torch.full((4,), 4 / (1 + mu) ** 2).double(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(cross.diagonal(), of_tests, rtol=1e-6, atol=0.0)


def test_an_indefinite_curvature_and_other_sketches_have_no_error():
    given = Solving("hessian")
    state = prepared(given, rf.sketches.Gaussian(16), corrected=False)
    assert state.deviations(given.tests, {"full": 50.0}) is None
    assert state.targets({"full": 50.0}) == {"full": 50.0}
    for sketch in (rf.sketches.Kronecker(4, 4), rf.sketches.TensorSketch(16)):
        assert not has_error_formula(sketch)
    positive = Solving(blocks="module")
    state = prepared(positive, rf.sketches.TensorSketch(16), corrected=False)
    assert state.deviations(positive.tests, positive.shifts(0.3)) is None
    assert state.targets(positive.shifts(0.3)) == positive.shifts(0.3)
    assert all(has_error_formula(make(8)) for make in SKETCHES.values())


def test_without_damping_the_target_is_the_harmonic_mean_of_the_sketched_eigenvalues():
    given, sketch, shifts = Solving(), rf.sketches.Gaussian(8, seed=3), {"full": 0.0}
    P = sketch.matrix(given.G["full"].shape[1])
    M = P @ curvature(given.G["full"]) @ P.T
    state = prepared(given, sketch, corrected=False)
    kappa = 1 / float(torch.linalg.inv(M).trace() / 8)
    assert state.targets(shifts)["full"] == pytest.approx(kappa, rel=1e-8)
    square = torch.linalg.inv(M @ M)
    PV, PG = given.V["full"] @ P.T, given.G["full"] @ P.T
    s = [(X @ square * X).sum(dim=1) for X in (PV, PG)]
    wanted = ((s[0][:, None] * s[1] + (PV @ square @ PG.T) ** 2) / square.trace()).sqrt()
    assert_equal(dict(state.deviations(given.tests, shifts))["full"], wanted, 1e-7)


def test_standard_errors_are_the_variances_of_a_wishart_matrix():
    """The formula where it is exact: C = 0, so that τ̃ = (Pv)ᵀ(Pg)/μ, with variance (‖v‖²‖g‖² + (vᵀg)²)/(mμ²)."""
    generator = torch.Generator().manual_seed(0)
    V, G = torch.randn(3, 6, generator=generator).double(), torch.randn(4, 6, generator=generator).double()
    m, mu = 50, 0.7
    scale = rf.theory.sketch_variance_scale(torch.zeros(m), m, mu)
    found = standard_errors(V @ G.T / mu**2, V.square().sum(1) / mu**2, G.square().sum(1) / mu**2, scale)
    wanted = ((V.square().sum(1)[:, None] * G.square().sum(1) + (V @ G.T) ** 2) / (m * mu**2)).sqrt()
    torch.testing.assert_close(found, wanted)


# ---------------------------------------------------------------- through Influence


class Net:
    """39 train and 5 test examples of a small network; d = 35."""

    def __init__(self):
        generator = torch.Generator().manual_seed(2)

        def rows(n):
            return torch.randn(n, 4, generator=generator).double(), torch.randint(3, (n,), generator=generator)

        self.model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        for parameter in self.model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).double()
        self.train, self.test = rows(39), rows(5)
        names = [name for name, _ in self.model.named_parameters()]

        def loss(model, batch):
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

        self.G, self.V = (loop_gradients(self.model, loss, names, data) for data in (self.train, self.test))

    def influence(self, sketch, corrected=True, curvature="fisher", weights=None, l2=0.0, **options):
        solver = rf.solvers.Sketched(sketch, corrected)
        influence = rf.Influence(
            rf.Task(self.model, l2=l2), curvature, solver, **{"damping": 0.2, "progress": False, **options}
        )
        return influence.fit(self.train, weights=weights)


@pytest.fixture(scope="module")
def net():
    return Net()


@pytest.mark.parametrize("m", [12, 60])
def test_scores_of_a_plain_sketch_name_the_damping_that_they_estimate(net, m):
    sketch = rf.sketches.Gaussian(m, seed=1)
    P = sketch.matrix(35)
    M = P @ curvature(net.G) @ P.T
    wanted, kappa = errors_about(net.V @ P.T, net.G @ P.T, M, 0.25)
    plain = net.influence(sketch, corrected=False, l2=0.05).score(net.test)
    assert plain.target_damping == pytest.approx(kappa - 0.05, rel=1e-9)
    assert plain.manifest["target_damping"] == plain.target_damping
    assert plain.manifest["damping"] == 0.2
    assert_equal(plain.values, scores(net.V @ P.T, net.G @ P.T, 0.25))
    assert_equal(plain.error, wanted, 1e-6)
    corrected = net.influence(sketch, l2=0.05).score(net.test)
    assert corrected.target_damping == corrected.manifest["target_damping"] == 0.2


def test_the_variances_of_blocks_add_up(net):
    influence = net.influence(rf.sketches.SJLT(24), blocks="module", damping={"0": 0.3, "2": 0.1})
    parts, total = influence.score(net.test, by_block=True), influence.score(net.test)
    assert {block: part.target_damping for block, part in parts.items()} == {"0": 0.3, "2": 0.1}
    assert total.target_damping == {"0": 0.3, "2": 0.1}
    assert_equal(total.error.square(), sum(part.error.square() for part in parts.values()), 1e-12)
    plain = net.influence(rf.sketches.SJLT(24), corrected=False, blocks="module")
    kappas = {block: part.target_damping for block, part in plain.score(net.test, by_block=True).items()}
    assert plain.score(net.test).target_damping == kappas
    assert all(kappa > 0.2 for kappa in kappas.values())


@pytest.mark.parametrize("m", [12, 60])
def test_groups_weights_and_norms_carry_over_to_the_errors(net, m):
    influence = net.influence(rf.sketches.Rademacher(m, seed=4), weights=torch.linspace(0.1, 2, 39))
    single, factors = influence.score(net.test), torch.linspace(-1, 1.3, 39, dtype=torch.float64)
    assert_equal(influence.score(net.test, weights=factors).error, single.error * factors.abs(), 1e-12)
    normed = influence.score(net.test, normalize="theta-relatif")
    assert_equal(normed.error / single.error, normed.values / single.values, 1e-9)
    alone = influence.score(net.test, groups=list(range(39)), weights=factors)
    assert_equal(alone.error, single.error * factors.abs(), 1e-8)
    classes = influence.score(net.test, groups="class", weights=factors)
    members = net.train[1][:, None] == torch.arange(3)
    bound = (single.error * factors.abs()) @ members.double()
    assert bool((classes.error < bound).all())
    state, P = influence._fitted().state, rf.sketches.Rademacher(m, seed=4).matrix(35)
    w = torch.linspace(0.1, 2, 39).double()
    summed = members.double().T @ (net.G * (w * factors)[:, None])
    wanted, _ = errors_about(net.V @ P.T, summed @ P.T, P @ curvature(net.G, w) @ P.T, state.shift("full", 0.2))
    assert_equal(classes.error, wanted, 1e-6)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("m", [12, 60])
def test_the_lengths_of_parameter_changes_are_at_the_damping_of_the_scores(net, m, corrected):
    """‖(C+κ)⁻¹wg‖² = −w ∂τ(g, wg)/∂κ, of exact scores and of those that estimate them at κ."""
    weights = torch.linspace(0.1, 2, 39).double()
    influence = net.influence(rf.sketches.Rademacher(m, seed=4), corrected, weights=weights)
    state, step = influence._fitted().state, 1e-4
    ends = [{"full": 0.2 + step}, {"full": 0.2 - step}]
    change = torch.sub(*(state.self_influence(end) for end in ends))
    kappa = [state.targets(end)["full"] for end in ends]
    assert_equal(state.inverse_norms({"full": 0.2}), -weights * change / (kappa[0] - kappa[1]), 1e-5)


def test_the_sampled_labels_of_a_group_have_the_error_of_their_sum():
    """Of one group of one class that is one example the error is the example's; of two copies it is twice that."""
    net = Net()
    x, y = (torch.cat([part, part[:1]]) for part in net.train)
    influence = rf.Influence(
        rf.Task(net.model), "mc_fisher", rf.solvers.Gram(), 0.2, samples=4, seed=1, progress=False
    ).fit((x, y))
    single = influence.score(net.test)
    torch.testing.assert_close(single.values[:, 0], single.values[:, -1])
    labels = [*range(39), 0]
    pairs = influence.score(net.test, groups=labels)
    torch.testing.assert_close(pairs.error[:, 0], 2 * single.error[:, 0])
    torch.testing.assert_close(pairs.error[:, 1:], single.error[:, 1:39])


def test_errors_can_be_left_out(net):
    influence = net.influence(rf.sketches.Gaussian(12, seed=1), corrected=False)
    full, bare = influence.score(net.test), influence.score(net.test, errors=False)
    assert bare.error is None
    assert bare.target_damping == full.target_damping
    assert torch.equal(bare.values, full.values)
    assert influence.score(net.test, errors=False, by_block=True)["full"].error is None


@pytest.mark.parametrize("m", [16, 48])
def test_the_target_by_a_cholesky_factor_is_that_of_the_eigenvalues(m, monkeypatch):
    from refluence.solvers import psd

    given, sketch, shifts = Solving(), rf.sketches.Gaussian(m, seed=3), {"full": 0.07}
    monkeypatch.setattr(psd, "SMALL", 4)
    by_factor = prepared(given, sketch, corrected=False)
    found = by_factor.targets(shifts)["full"]
    assert by_factor.systems["full"]._eigenvalues is None
    spectrum = by_factor.systems["full"].eigenvalues
    assert found == pytest.approx(rf.theory.implied_damping(spectrum, m, 0.07), rel=1e-10)
    assert by_factor.targets(shifts)["full"] == pytest.approx(found, rel=1e-10)


@pytest.mark.filterwarnings("ignore:the damped hessian")
def test_a_hessian_has_no_error_and_keeps_its_damping(net):
    for corrected in (True, False):
        found = net.influence(rf.sketches.Gaussian(24), corrected, "hessian", damping=60.0).score(net.test)
        assert found.error is None
        assert found.target_damping == 60.0


def test_a_fit_that_was_saved_has_the_same_errors(net, tmp_path):
    influence = net.influence(rf.sketches.SJLT(12, seed=2), corrected=False)
    again = rf.Influence.load(influence.save(tmp_path / "fit"), influence.task)
    found, wanted = again.score(net.test), influence.score(net.test)
    assert torch.equal(found.error, wanted.error)
    loaded = rf.Scores.load(found.save(tmp_path / "scores"))
    assert torch.equal(loaded.error, wanted.error)
    assert loaded.target_damping == wanted.target_damping


# ---------------------------------------------------------------- coverage


class Digits:
    """A trained network on 8×8 digits with tests whose gradients lie outside the span of the train gradients."""

    def __init__(self):
        data = load_dataset("digits", n_train=150, n_test=40)
        train, test = ((x.flatten(1).double(), y) for x, y in (data.train, data.test))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
        optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(train[0]), train[1]).backward()
            optimizer.step()
        names = [name for name, _ in self.model.named_parameters()]

        def loss(model, batch):
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

        G, V = (loop_gradients(self.model, loss, names, data) for data in (train, test))
        self.d = G.shape[1]
        self.G, self.V, self.C = G, V, curvature(G)
        spectrum = torch.linalg.eigvalsh(self.C).clamp(min=0)
        self.kappa = rf.theory.damping_for(spectrum, 20.0)
        self.exact = bilinear(V, G, self.C, self.kappa)
        outside = V - torch.linalg.lstsq(G.T, V.T).solution.T @ G
        self.outside = outside.norm(dim=1) / V.norm(dim=1)
        self.train, self.test = train, test


@pytest.fixture(scope="module")
def digits():
    return Digits()


SIZES = {"1.5": 30, "2": 40, "4": 80, "8": 160}
"""m/d_κ → m for d_κ = 20; n = 150, so that the largest is on the n×n side."""


@pytest.mark.parametrize("ratio", SIZES)
@pytest.mark.parametrize("kind", [rf.sketches.Gaussian, rf.sketches.SJLT])
def test_intervals_of_95_percent_cover_the_exact_scores_that_often(digits, kind, ratio):
    """Of all pairs over 30 independent sketches; everything that the intervals are made of is from the sketch alone."""
    assert float(digits.outside.median()) > 0.2
    m, trials = SIZES[ratio], 30
    fitted = rf.Influence(rf.Task(digits.model), solver=rf.solvers.Gram(), damping=digits.kappa, progress=False)
    fitted.fit(digits.train)
    held, tests = fitted._fitted().curvature, fitted._test_rows(digits.test)
    covered, spread = [], []
    for seed in range(trials):
        state = rf.solvers.Sketched(kind(m, seed=seed)).prepare(held)
        shifts = {"full": digits.kappa}
        [(_, values)], [(_, errors)] = state.scores(tests, shifts), state.deviations(tests, shifts)
        away = ((values - digits.exact) / errors).abs()
        covered.append(float((away <= 1.959964).double().mean()))
        spread.append(float(away.square().mean()))
    assert 0.93 < np.mean(covered) < 0.97
    assert 0.8 < np.mean(spread) < 1.25
