"""Gram matrices of outer-product gradients by their factors equal those of the rows, for every pair of factors."""

import itertools

import pytest
import torch

from refluence.gradients.blocks import DenseBlock, add_dense_gram
from refluence.gradients.factors import Dense, OneHot, Patches, Term, inner
from refluence.gradients.outer import OuterBlock

R, C = 6, 8


def factors(n, seed):
    """Vectors of length R at three positions, of every kind that an example's factor has."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, 3, 4, generator=generator, dtype=torch.float64)
    return {
        "dense": Dense(torch.randn(n, 3, R, generator=generator, dtype=torch.float64)),
        "one-hot": OneHot(torch.randint(R, (n, 3), generator=generator), R, torch.float64),
        "patches": Patches(images, (2,), (1,), (1,), (0, 0)),
    }


KINDS = list(factors(1, 0))
pairs = pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, KINDS)))


def block(n, seed, row="dense", bias=False):
    """Gradients of an (R, C) matrix from two terms, so that no shortcut for one position is taken."""
    generator = torch.Generator().manual_seed(seed)
    columns = [Dense(torch.randn(n, 3, C, generator=generator, dtype=torch.float64)) for _ in range(2)]
    rows = [factors(n, seed)[row], factors(n, seed + 1)["dense"]]
    return OuterBlock(tuple(Term(r, c) for r, c in zip(rows, columns, strict=True)), bias)


@pairs
def test_inner_products_are_those_of_the_vectors(first, second):
    a, b = factors(4, 1)[first], factors(5, 2)[second]
    expected = torch.einsum("ntk,msk->ntms", a.vectors(), b.vectors())
    torch.testing.assert_close(inner(a, b, torch.float64), expected)


@pairs
@pytest.mark.parametrize("bias", [False, True])
def test_grams_by_factors_and_by_rows_are_those_of_the_dense_gradients(first, second, bias):
    bias = bias and "one-hot" not in (first, second)
    a, b = block(4, 1, first, bias), block(5, 7, second, bias)
    expected = a.dense() @ b.dense().T
    by_factors, by_rows = (torch.zeros(4, 5, dtype=torch.float64) for _ in range(2))
    a._add_gram_of_factors(by_factors, b)
    add_dense_gram(by_rows, a, b)
    torch.testing.assert_close(by_factors, expected)
    torch.testing.assert_close(by_rows, expected)
    torch.testing.assert_close(a.gram(b), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_is_the_sum_over_positions_of_the_outer_products(kind, transposed):
    long, short = factors(4, 1)[kind], Dense(torch.randn(4, 3, C, dtype=torch.float64))
    row, column = (short, long) if transposed else (long, short)
    expected = torch.einsum("ntr,ntc->nrc", row.vectors(), column.vectors()).flatten(1)
    torch.testing.assert_close(OuterBlock((Term(row, column),)).dense(), expected)
    with_bias = OuterBlock((Term(row, column),), bias=True).dense()
    torch.testing.assert_close(with_bias, torch.cat([expected, row.vectors().sum(dim=1)], dim=1))


@pytest.mark.parametrize("bias", [False, True])
def test_grams_with_dense_blocks_of_the_same_parameters(bias):
    """A batch may have had to take another route than the one before it."""
    a, b = block(4, 1, bias=bias), block(5, 7, bias=bias)
    expected = a.dense() @ b.dense().T
    torch.testing.assert_close(a.gram(DenseBlock(b.dense())), expected)
    torch.testing.assert_close(DenseBlock(a.dense()).gram(b), expected)


def test_single_positions_take_the_product_of_two_grams():
    def single(n, seed):
        generator = torch.Generator().manual_seed(seed)
        row, column = (torch.randn(n, 1, k, generator=generator, dtype=torch.float64) for k in (R, C))
        return OuterBlock((Term(Dense(row), Dense(column)),), True)

    a, b = single(4, 0), single(5, 1)
    assert a.inner_product_work() == R + C
    torch.testing.assert_close(a.gram(b), a.dense() @ b.dense().T)


def test_a_row_that_is_not_finite_is_found_in_any_factor():
    good = block(4, 1)
    assert good.nonfinite_row() is None
    values = good.terms[1].column.vectors().clone()
    values[2, 1, 0] = torch.nan
    assert OuterBlock((good.terms[0], Term(good.terms[1].row, Dense(values)))).nonfinite_row() == 2
