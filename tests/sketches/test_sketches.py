"""Every sketch: E[PᵀP] = I, one P for a seed however the work is split, and nested sizes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import refluence as rf
from refluence.errors import RefluenceError
from refluence.gradients.blocks import DenseBlock
from refluence.gradients.factors import Dense
from refluence.gradients.outer import OuterBlock, Term

SKETCHES = [
    rf.sketches.Gaussian(48, seed=3),
    rf.sketches.Rademacher(48, seed=3),
    rf.sketches.SJLT(48, seed=3),
    rf.sketches.SJLT(48, nonzeros=3, seed=3),
]


@pytest.fixture(params=SKETCHES, ids=repr)
def sketch(request):
    return request.param


def test_projection_is_the_product_with_its_matrix(sketch):
    G = torch.randn(7, 500, dtype=torch.float64)
    P = sketch.matrix(500)
    assert P.shape == (48, 500)
    torch.testing.assert_close(sketch.project(G), G @ P.T, rtol=0, atol=1e-12)


def test_the_second_moment_is_the_identity_in_expectation(sketch):
    draws, d = 400, 6
    moments = torch.stack([(P := sketch.reseeded(seed).matrix(d)).T @ P for seed in range(draws)])
    error = moments.std(dim=0) / draws**0.5
    assert ((moments.mean(dim=0) - torch.eye(d)).abs() <= 4.5 * error + 1e-12).all()


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 9_999), max_size=5, unique=True), index=st.integers(0, len(SKETCHES) - 1))
def test_columns_may_come_in_any_chunks_and_order(cuts, index):
    sketch = SKETCHES[index]
    G = torch.randn(3, 10_000, dtype=torch.float64)
    out = torch.zeros(3, 48, dtype=torch.float64)
    bounds = [0, *sorted(cuts), 10_000]
    for start, stop in reversed(list(itertools.pairwise(bounds))):
        sketch.accumulate(out, G[:, start:stop], start)
    torch.testing.assert_close(out, sketch.project(G), rtol=0, atol=1e-11)


def test_examples_last_in_memory_give_the_same(sketch):
    G = torch.randn(5, 300, dtype=torch.float64)
    out = torch.zeros(5, 48, dtype=torch.float64)
    sketch.accumulate(out, G.T.contiguous().T, 0)
    torch.testing.assert_close(out, sketch.project(G), rtol=0, atol=1e-12)


def test_blocks_and_rows_have_the_same_projection(sketch):
    terms = (Term(Dense(torch.randn(70, 1, 9).double()), Dense(torch.randn(70, 1, 11).double())),)
    positions = (Term(Dense(torch.randn(70, 4, 9).double()), Dense(torch.randn(70, 4, 11).double())),)
    for block in (
        OuterBlock(terms, bias=True),
        OuterBlock(positions, bias=True),
        DenseBlock(torch.randn(70, 99).double()),
    ):
        torch.testing.assert_close(sketch.project(block), sketch.project(block.dense()), rtol=0, atol=1e-12)
        torch.testing.assert_close(sketch.project(block.rows(5, 70)), sketch.project(block)[5:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [rf.sketches.Gaussian, rf.sketches.Rademacher])
def test_the_first_rows_of_a_dense_sketch_are_a_smaller_one(kind):
    large, small = kind(300, seed=5).matrix(50), kind(70, seed=5).matrix(50)
    torch.testing.assert_close(large[:70] * (300 / 70) ** 0.5, small, rtol=1e-12, atol=0)


@settings(max_examples=20, deadline=None)
@given(band=st.sampled_from([4, 8, 12]), factor=st.sampled_from([2, 3, 4]), nonzeros=st.integers(1, 4))
def test_sjlt_folds_to_sizes_that_divide_it(band, factor, nonzeros):
    small = rf.sketches.SJLT(band * nonzeros, nonzeros, seed=9)
    large = rf.sketches.SJLT(band * nonzeros * factor, nonzeros, seed=9)
    G = torch.randn(4, 200, dtype=torch.float64)
    torch.testing.assert_close(large.fold(large.project(G), small.m), small.project(G), rtol=0, atol=1e-12)


def test_sjlt_has_its_nonzeros_one_in_each_band():
    P = rf.sketches.SJLT(60, nonzeros=4, seed=1).matrix(2_000)
    bands = P.unflatten(0, (4, 15))
    assert ((bands != 0).sum(dim=1) == 1).all()
    torch.testing.assert_close(P[P != 0].abs(), torch.full((8_000,), 0.5, dtype=torch.float64))
    counts = (bands != 0).sum(dim=2)
    assert (counts - 2_000 / 15).abs().max() < 6 * (2_000 / 15) ** 0.5
    assert (P.sign().sum() / 8_000**0.5).abs() < 4


def test_seeds_give_different_sketches(sketch):
    assert not torch.equal(sketch.matrix(40), sketch.reseeded(4).matrix(40))
    torch.testing.assert_close(sketch.matrix(40), sketch.reseeded(3).matrix(40))


def test_columns_far_out_need_no_columns_before_them(sketch):
    out = torch.zeros(1, 48, dtype=torch.float64)
    sketch.accumulate(out, torch.ones(1, 1, dtype=torch.float64), 3_000_000_000)
    assert 0 < out.square().sum() < 3


@pytest.mark.parametrize("size", [0, -1, 2.5, "8", True])
def test_sizes_that_are_none_are_refused(size):
    # The checker of types that the tests run under speaks first where the type is wrong.
    with pytest.raises((RefluenceError, TypeError), match=r"m of a sketch|parameter 'm'"):
        rf.sketches.Gaussian(size)


def test_wrong_nonzeros_and_rows_are_refused(sketch):
    with pytest.raises(RefluenceError, match="multiple of nonzeros"):
        rf.sketches.SJLT(10, nonzeros=3)
    with pytest.raises(RefluenceError, match="divide"):
        rf.sketches.SJLT(10).fold(torch.zeros(1, 10), 4)
    with pytest.raises((RefluenceError, TypeError), match=r"floating-point|parameter 'gradients'"):
        sketch.project(torch.ones(3, 4, dtype=torch.int64))
