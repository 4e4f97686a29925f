"""What a certificate says of the error is true: for every pair where it says certain, as often as it says elsewhere."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import refluence as rf
from refluence.certificates import certify
from refluence.certificates.sampled import SampledCheck, needed_sample
from refluence.errors import DataError
from support.wide import Wide

N, K = 40, 9
SKETCHES = {
    "gaussian": lambda m, seed: rf.sketches.Gaussian(m, seed=seed),
    "sjlt": lambda m, seed: rf.sketches.SJLT(m, seed=seed),
}


@pytest.fixture(scope="module")
def problem():
    return Wide(N, K, inputs=5, hidden=8, seed=3, damping=1e-2)


@pytest.mark.parametrize("kind", SKETCHES)
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("m", [30, 60, 200])
def test_no_pair_is_ever_outside_the_certain_bound(problem, kind, corrected, m):
    for seed in range(2):
        influence = problem.influence(rf.solvers.Sketched(SKETCHES[kind](m, seed), corrected=corrected))
        certificate = certify(influence, problem.test)
        target = certificate.scores.target_damping
        exact = problem.exact.at(target).score(problem.test).values
        assert ((certificate.scores.values - exact).abs() <= certificate.bound.values).all()


def test_with_weights_blocks_and_l2_too(problem):
    reference = problem.influence(rf.solvers.Gram(), problem.weights, blocks="module", l2=1e-2)
    exact = reference.score(problem.test).values
    for seed in range(2):
        sketch = rf.solvers.Sketched(rf.sketches.Gaussian(60, seed=seed))
        influence = problem.influence(sketch, problem.weights, blocks="module", l2=1e-2)
        certificate = certify(influence, problem.test)
        error = (certificate.scores.values - exact).abs()
        assert (error <= certificate.bound.values + 1e-12).all()
        assert certificate.bound.values[:, ::6].abs().max() < 1e-12


def test_the_bound_is_of_use_where_the_sketch_is_large(problem):
    influence = problem.influence(rf.solvers.Sketched(rf.sketches.Gaussian(20_000, seed=0)), damping=0.1)
    certificate = certify(influence, problem.test)
    assert max(certificate.bound.factors.values()) < 0.1


def test_the_factor_is_reached_by_some_vector(problem):
    """The largest error over all vectors in the span, relative to √gap·√gap, is the factor itself."""
    from refluence.gradients.kernels import gram_matrices

    influence = problem.influence(rf.solvers.Sketched(rf.sketches.Gaussian(60, seed=1)))
    [factor] = certify(influence, problem.test).bound.factors.values()
    state, kappa = influence._fitted().state, influence.damping
    [K_] = gram_matrices(influence._fitted().rows).values()
    K_ = K_.numpy() / N
    R = state.projected.rows()["full"].double().numpy()
    mu = state.shift("full", kappa)
    # Scores of the vectors Gᵀy: n·yᵀ[K(K+κ)⁻¹]y exact and n·yᵀ[K̃(K̃+μ)⁻¹]y sketched, gaps n·yᵀκ(K+κ)⁻¹... of u = K^½y.
    assert np.linalg.matrix_rank(K_) == N
    sketched = R @ R.T / N
    difference = N * (sketched @ np.linalg.inv(sketched + mu * np.eye(N)) - K_ @ np.linalg.inv(K_ + kappa * np.eye(N)))
    gap = N * kappa * np.linalg.inv(K_ + kappa * np.eye(N))
    L = np.linalg.cholesky(gap)
    whitened = np.linalg.solve(L, np.linalg.solve(L, difference).T)
    assert np.isclose(np.abs(np.linalg.eigvalsh((whitened + whitened.T) / 2)).max(), factor, rtol=1e-8)


def test_what_lies_outside_the_span_is_what_a_projection_leaves(problem):
    influence = problem.influence(rf.solvers.Sketched(rf.sketches.Gaussian(60)))
    certificate = certify(influence, problem.test)
    G, V = (gradients(problem, data) for data in (problem.train, problem.test))
    rest = V - V @ torch.linalg.pinv(G) @ G
    torch.testing.assert_close(certificate.bound.outside, rest.norm(dim=1) / V.norm(dim=1))
    state = influence._fitted().state
    P = state.sketches["full"].matrix(G.shape[1])
    M = P @ (G.T @ G / N) @ P.T + state.shift("full", influence.damping) * torch.eye(60)
    leaked = rest @ P.T @ torch.linalg.solve(M, P @ G.T)
    torch.testing.assert_close(certificate.bound.leaked, leaked.square().mean(dim=1).sqrt())


def test_leakage_is_as_large_as_predicted(problem):
    leaked, expected = [], []
    for seed in range(24):
        bound = certify(problem.influence(rf.solvers.Sketched(rf.sketches.Gaussian(60, seed=seed))), problem.test).bound
        leaked.append(bound.leaked.square())
        expected.append(bound.leakage_deviation.square())
    ratio = torch.stack(leaked).mean(dim=0) / torch.stack(expected).mean(dim=0)
    assert (ratio - 1).abs().max() < 0.4


def gradients(problem, data):
    rows = []
    for x, y in zip(*data, strict=True):
        loss = nn.functional.cross_entropy(problem.model(x[None]), y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(problem.model.parameters()))]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "solver",
    [rf.solvers.Sketched(rf.sketches.SJLT(64)), rf.solvers.Ekfac(), rf.solvers.Arnoldi(8)],
)
def test_measured_errors_are_those_against_the_exact_scores(problem, solver):
    influence = problem.influence(solver)
    certificate = certify(influence, problem.test, sample=5, seed=2)
    exact = problem.exact.score(problem.test).values
    rows = certificate.sampled.rows
    assert len(rows) == len(set(rows.tolist())) == 5
    torch.testing.assert_close(certificate.sampled.exact, exact[rows], rtol=1e-6, atol=1e-9)
    error = (certificate.scores.values - exact).norm(dim=1) / exact.norm(dim=1)
    torch.testing.assert_close(certificate.sampled.errors, error[rows], rtol=1e-5, atol=1e-9)
    frame = certificate.frame.set_index("test")
    assert frame["checked"].sum() == 5
    assert frame.loc[rows.tolist(), "error"].to_numpy() == pytest.approx(error[rows].numpy(), rel=1e-5, abs=1e-9)
    assert frame.loc[~frame["checked"], "error"].isna().all()


def test_a_sketch_that_grows_as_it_scores_is_certified_as_it_is_then(problem):
    influence = problem.influence(rf.solvers.Sketched(rf.sketches.Gaussian(48)), accuracy=rf.Accuracy(0.5))
    before = influence.plan.solver
    far = problem.test[0] * 6, problem.test[1]
    certificate = certify(influence, far)
    assert certificate.solver == influence.plan.solver != before
    exact = problem.exact.score(far).values
    torch.testing.assert_close(certificate.sampled.exact, exact[certificate.sampled.rows], rtol=1e-8, atol=1e-10)
    again = certify(influence, far)
    assert again.bound.factors == certificate.bound.factors
    torch.testing.assert_close(again.bound.values, certificate.bound.values)


def test_an_exact_solver_needs_no_sample(problem):
    certificate = certify(problem.influence(rf.solvers.Gram()), problem.test)
    assert certificate.exact
    assert certificate.sampled is None
    assert certificate.largest_error == 0
    assert "exact scores" in certificate.summary()


def test_the_residual_of_an_iterative_solver_is_shown(problem):
    solver = rf.solvers.ConjugateGradient(rtol=1e-3)
    certificate = certify(problem.influence(solver, curvature="ggn"), problem.test)
    assert 0 < certificate.residual <= 1e-3
    assert certificate.largest_error < 0.1
    assert "residual" in certificate.summary()
    assert f"on all {K} tests" in certificate.summary()
    assert "on 5 random tests" in certify(problem.influence(rf.solvers.Kfac()), problem.test, sample=5).summary()


def check_of(errors, confidence=0.95):
    rows = torch.arange(len(errors))
    return SampledCheck(
        rows, torch.zeros(len(errors), 1).double(), torch.as_tensor(errors).double(), "Gram", None, None, confidence
    )


@pytest.mark.parametrize(("size", "share"), [(59, 0.95), (30, 0.8), (100, 0.9)])
def test_the_order_statistic_holds_with_its_confidence_whatever_the_distribution(size, share):
    """Over many samples the share that the bound really covers is below the stated one in at most 5 % of them."""
    generator = np.random.default_rng(0)
    failures, repeats = 0, 2_000
    for _ in range(repeats):
        bound = check_of(generator.pareto(1.0, size)).bound(share)
        failures += (1 - (1 + bound) ** -1.0) < share
    assert failures / repeats <= 0.05 + 3 * (0.05 * 0.95 / repeats) ** 0.5


def test_the_order_statistic_is_not_the_maximum_where_a_smaller_one_will_do():
    errors = np.arange(1.0, 201.0)
    bound = check_of(errors).bound(0.9)
    assert bound < 200
    rank = int(bound)
    assert stats.binom.sf(rank - 1, 200, 0.9) <= 0.05 < stats.binom.sf(rank - 2, 200, 0.9)


def test_too_small_a_sample_says_how_large_it_must_be():
    with pytest.raises(DataError, match="sample 59"):
        check_of(np.ones(20)).bound(0.95)


@pytest.mark.parametrize(("share", "confidence"), [(0.3, 0.91), (0.35, 0.8775), (0.85, 0.2775)])
def test_the_size_that_is_asked_for_is_the_least_that_will_do(share, confidence):
    """Two tests, 1 − share² being the confidence but for rounding."""
    assert needed_sample(share, confidence) == 2
    assert check_of(np.ones(2), confidence).bound(share) == 1
    with pytest.raises(DataError, match="sample 2"):
        check_of(np.ones(1), confidence).bound(share)


def test_intervals_are_checked_against_the_exact_scores(problem):
    shares = []
    for seed in range(8):
        influence = problem.influence(rf.solvers.Sketched(rf.sketches.Gaussian(120, seed=seed)), damping=0.05)
        certificate = certify(influence, problem.test)
        low, high = certificate.scores.interval(0.95)
        exact = certificate.sampled.exact
        inside = ((low <= exact) & (exact <= high)).double().mean()
        assert certificate.sampled.coverage == pytest.approx(float(inside))
        shares.append(certificate.sampled.coverage)
    assert 0.9 < np.mean(shares) < 0.99


def test_a_record_can_be_written(problem):
    import json

    for solver in (rf.solvers.Sketched(rf.sketches.SJLT(64)), rf.solvers.Gram(), rf.solvers.Kfac()):
        manifest = certify(problem.influence(solver), problem.test).manifest()
        assert json.loads(json.dumps(manifest)) == manifest


def test_bad_questions(problem):
    influence = problem.influence(rf.solvers.Kfac())
    with pytest.raises(DataError, match="confidence"):
        certify(influence, problem.test, confidence=95)
    with pytest.raises(DataError, match="sample must be 1 to 9"):
        certify(influence, problem.test, sample=10)
    with pytest.raises(DataError, match="it is for single sketches, and the solver is Kfac"):
        certify(influence, problem.test, deterministic=True)
    ggn = problem.influence(rf.solvers.Sketched(rf.sketches.SJLT(64)), curvature="ggn")
    with pytest.raises(DataError, match='this is "ggn"'):
        certify(ggn, problem.test, deterministic=True)
    with pytest.raises(DataError, match="Identity"):
        certify(problem.influence(rf.solvers.Identity()), problem.test)
    assert "no certain bound" in certify(ggn, problem.test).summary()


def test_it_is_the_same_however_the_data_are_cut(problem):
    solver = rf.solvers.Sketched(rf.sketches.Gaussian(60))
    one, many = (certify(problem.influence(solver, batch_size=size), problem.test) for size in (N, 7))
    torch.testing.assert_close(one.bound.values, many.bound.values, rtol=1e-6, atol=1e-9)
    assert one.sampled.rows.tolist() == many.sampled.rows.tolist()
    assert dataclasses.replace(one.sampled).errors.tolist() == pytest.approx(many.sampled.errors.tolist(), rel=1e-5)
