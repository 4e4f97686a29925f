"""Sketches in the eigenvectors of F, and of the gradients: their law, their nesting, and every form of their scores."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from refluence.errors import RefluenceError
from refluence.sketches import SJLT, Gaussian, Rademacher
from refluence.studies.projection.gaussian import GramGaussian, bartlett_factor, upper_gram
from refluence.studies.projection.projected import Projected
from refluence.studies.projection.spectral import Spectral
from refluence.studies.projection.system import SketchedSystem, eigenvectors_pay

SIZES = [4, 16, 32, 64, 128, 512]
DAMPINGS = [1e-4, 1e-2, 1.0]


def dense_scores(train, tests, sketch, damping):
    """τ̃ of a matrix P (m×d), the m×m way."""
    train, tests = train @ sketch.T, tests @ sketch.T
    inner = train.T @ train / len(train) + damping * torch.eye(len(sketch), dtype=torch.float64)
    return train @ torch.linalg.solve(inner, tests.T)


@pytest.mark.parametrize("proj_type", ["normal", "rademacher", "sjlt"])
@pytest.mark.parametrize("offload", ["none", "disk"])
def test_projected_gradients_give_the_dense_scores_at_every_size(problem, gradients, proj_type, offload, tmp_path):
    train, tests = gradients
    source = Projected(proj_type, problem.rows("train"), problem.rows("test"), offload, tmp_path)
    kind = {"normal": Gaussian, "rademacher": Rademacher, "sjlt": SJLT}[proj_type]
    systems = list(source.systems(7, SIZES, set(SIZES)))
    assert [system.size for system in systems] == SIZES
    assert [system.dual for system in systems] == [m >= 60 for m in SIZES]
    for system in systems:
        # every size is the library's own sketch of that size, at any size of the grid
        sketch = kind(system.size, seed=7).matrix(train.shape[1])
        for damping, scores in zip(DAMPINGS, system.scores(DAMPINGS), strict=True):
            exact = dense_scores(train, tests, sketch, damping)
            assert_close(scores, exact, rtol=1e-6, atol=1e-8 * float(exact.abs().max()))
    assert not list(tmp_path.iterdir())


def test_sizes_that_no_folding_reaches_have_a_pass_of_their_own(problem, gradients):
    source = Projected("sjlt", problem.rows("train"), problem.rows("test"))
    (odd, last) = source.systems(3, [24, 64], {24, 64})
    for system in (odd, last):
        sketch = SJLT(system.size, seed=3).matrix(gradients[0].shape[1])
        assert_close(next(system.scores([0.1])), dense_scores(*gradients, sketch, 0.1), rtol=1e-7, atol=1e-9)


def test_self_influence_takes_its_tests_from_the_train_rows(problem, gradients):
    source = Projected("sjlt", problem.rows("train"), problem.rows("test"), of_train=9)
    for system in source.systems(1, [16, 128], {16, 128}):
        sketch = SJLT(system.size, seed=1).matrix(gradients[0].shape[1])
        scores = next(system.first_rows(9).scores([0.01]))
        exact = dense_scores(gradients[0], gradients[0][:9], sketch, 0.01)[:9]
        assert_close(scores, exact, rtol=1e-7, atol=1e-9 * float(exact.abs().max()))


def system_of(side, seed=0, s=9, rows=20, k=3):
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows + k, s)))
    left, right = values[:rows], values[rows:].T
    curvature = left.T @ left / rows
    return SketchedSystem(s, curvature, left if side == "rows" else None, right)


@pytest.mark.parametrize("side", ["rows", "kernel"])
def test_factors_and_eigenvectors_give_the_same_scores(side, monkeypatch):
    system = system_of(side)
    inverse = [torch.linalg.inv(system.curvature + damping * torch.eye(9, dtype=torch.float64)) for damping in DAMPINGS]
    left = torch.eye(9, dtype=torch.float64) if system.left is None else system.left
    for pay in (False, True):
        monkeypatch.setattr("refluence.studies.projection.system.eigenvectors_pay", lambda *_, pay=pay: pay)
        for found, inner in zip(system.scores(DAMPINGS), inverse, strict=True):
            assert_close(found, left @ inner @ system.right, rtol=1e-10, atol=1e-12)
        weights = torch.ones(2, len(left), dtype=torch.float64).cumsum(dim=1)
        for found, inner in zip(system.summed(weights).scores(DAMPINGS), inverse, strict=True):
            assert_close(found, weights @ left @ inner @ system.right, rtol=1e-10, atol=1e-10)


def test_few_dampings_take_factors_and_many_eigenvectors():
    assert not eigenvectors_pay(4096, 500, 5000, 8)
    assert eigenvectors_pay(4096, 500, 5000, 50)
    assert not eigenvectors_pay(64, 500, 5000, 1)


def test_a_damping_below_rounding_is_refused():
    broken = SketchedSystem(2, -torch.eye(2, dtype=torch.float64), None, torch.ones(2, 1, dtype=torch.float64))
    with pytest.raises(RefluenceError, match="below the rounding"):
        next(broken.scores([1e-9]))


@pytest.mark.parametrize("freedom", [6, 7, 40])
def test_bartlett_s_form_has_the_moments_of_a_wishart_matrix(freedom):
    """E W = f·I, Var W_ij = f(1 + [i = j]), within 5 standard errors over 1,000 draws."""
    generator = np.random.default_rng(5)
    draws = torch.stack([upper_gram(bartlett_factor(generator, 6, freedom)) for _ in range(1_000)])
    mean, eye = draws.mean(dim=0), torch.eye(6, dtype=torch.float64)
    assert float((mean - freedom * eye).abs().max()) < 5 * (2 * freedom / 1_000) ** 0.5
    assert_close(draws.var(dim=0), freedom * (1 + eye), rtol=0.4, atol=0)


def test_the_triangular_product_is_exact():
    factor = bartlett_factor(np.random.default_rng(0), 30, 50)
    assert_close(upper_gram(factor), torch.from_numpy(factor @ factor.T), rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def small():
    """Six train and three test gradients in ten dimensions, two of them out of range: small enough for many draws."""
    rows = torch.from_numpy(np.random.default_rng(1).standard_normal((9, 10)))
    rows[:6, 8:] = 0
    return rows


@pytest.mark.parametrize("size", [5, 30])
def test_a_sketch_of_the_gram_matrix_has_the_law_of_a_sketch_of_the_gradients(small, size):
    """Means, deviations and quantiles of scores over 1,000 draws of each, below the rank and beyond.

    Beyond, four rows and Wishart increments of 5 degrees of freedom (rows) and of 21 (Bartlett's form) are added.
    """
    train, tests = small[:6], small[6:]
    source = GramGaussian(Spectral.of_gram(small @ small.T, 6))
    draws, grid = 1_000, sorted({3, 4, 9, size})
    ours, theirs = [], []
    generator = torch.Generator().manual_seed(0)
    for seed in range(draws):
        (system,) = source.systems(seed, grid, {size})
        ours.append(next(system.scores([0.2])))
        sketch = torch.randn(size, 10, generator=generator, dtype=torch.float64) / size**0.5
        theirs.append(dense_scores(train, tests, sketch, 0.2))
    ours, theirs = torch.stack(ours).flatten(1), torch.stack(theirs).flatten(1)
    scale = theirs.std(dim=0)
    assert float(((ours.mean(dim=0) - theirs.mean(dim=0)) / scale).abs().max()) < 5 * (2 / draws) ** 0.5
    assert_close(ours.std(dim=0), scale, rtol=0.2, atol=0)
    levels = torch.tensor([0.1, 0.25, 0.75, 0.9], dtype=torch.float64)
    assert float(((ours.quantile(levels, dim=0) - theirs.quantile(levels, dim=0)) / scale).abs().max()) < 0.3


def test_a_growing_sketch_keeps_its_rows(small):
    """m·PGPᵀ of a smaller size is the corner of the larger one's; beyond the rank W only grows."""
    source = GramGaussian(Spectral.of_gram(small @ small.T, 6))
    found = {s.size: s for s in source.systems(2, [2, 3, 5, 6, 8, 40], {2, 3, 5, 6, 8, 40})}
    assert_close(2 * found[2].curvature, (5 * found[5].curvature)[:2, :2], rtol=1e-12, atol=0)
    assert_close(3**0.5 * found[3].right, 5**0.5 * found[5].right[:3], rtol=1e-12, atol=0)
    for less, more in ((6, 8), (8, 40)):
        growth = torch.linalg.eigvalsh(more * found[more].curvature - less * found[less].curvature)
        assert float(growth.min()) > -1e-10
        assert int((growth > 1e-10).sum()) == min(6, more - less)


def test_which_sizes_are_wanted_changes_no_number(small):
    """As after a kill."""
    source = GramGaussian(Spectral.of_gram(small @ small.T, 6))
    grid = [2, 4, 6, 9, 30]
    whole = {s.size: s for s in source.systems(4, grid, set(grid))}
    for wanted in ({30}, {9, 30}, {4}, {2, 9}):
        for system in source.systems(4, grid, wanted):
            assert_close(system.curvature, whole[system.size].curvature, rtol=1e-12, atol=0)
            assert_close(system.right, whole[system.size].right, rtol=1e-12, atol=1e-14)
    assert float((next(source.systems(5, grid, {6})).right - whole[6].right).abs().max()) > 1e-3


def test_a_very_large_sketch_is_exact(spectral):
    (system,) = GramGaussian(spectral).systems(0, [10**9], {10**9})
    assert_close(
        next(system.scores([0.1])), spectral.scores(0.1), rtol=0, atol=1e-3 * float(spectral.scores(0.1).abs().max())
    )
