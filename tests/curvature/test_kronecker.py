"""Factors, eigenbases and rotated gradients of one layer, against explicit matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refluence.curvature.kronecker import (
    KroneckerBlock,
    RotatedProduct,
    RotatedRows,
    RotatedTokens,
    dense_block,
    kronecker_block,
    rotated,
    squared_moment,
)
from refluence.curvature.layer_factors import _agree, covariances, factored_batches, layers_of, sides_of
from refluence.gradients.blocks import DenseBlock
from refluence.gradients.factors import Dense, OneHot, Term
from refluence.gradients.fan import FanBlock
from refluence.gradients.outer import OuterBlock
from support.kronecker import Problem
from support.models import Case, labels, rows

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def outer(b=6, t=1, R=3, C=4, bias=False, seed=0):
    return OuterBlock((Term(Dense(normal(b, t, R, seed=seed)), Dense(normal(b, t, C, seed=seed + 1))),), bias)


def tokens(b=6, t=5, V=7, C=3, seed=0):
    index = torch.randint(V, (b, t), generator=torch.Generator().manual_seed(seed))
    return OuterBlock(
        (
            Term(
                OneHot(index, V, F64),
                Dense(normal(b, t, C, seed=seed)),
            ),
        )
    )


def matrix_of(basis):
    """Q_E ⊗ Q_A with rows in the order of the parameters: the weight row by row, then the bias."""
    R, C = basis.values.shape
    Q = torch.kron(
        torch.eye(R, dtype=F64) if basis.rows is None else basis.rows.contiguous(),
        torch.eye(C, dtype=F64) if basis.columns is None else basis.columns.contiguous(),
    )
    if not basis.bias:
        return Q
    order = torch.arange(R * C).reshape(R, C)
    return Q[torch.cat([order[:, :-1].flatten(), order[:, -1]])]


def basis_of(parts, weights=None, n=6):
    return kronecker_block(covariances(parts, weights, "expand"), n, F64)


BLOCKS = {
    "one position": (outer(), RotatedProduct),
    "one position with bias": (outer(bias=True), RotatedProduct),
    "few positions": (outer(t=2, R=5, C=6, bias=True), RotatedRows),
    "many positions": (outer(t=40), RotatedRows),
    "tokens": (tokens(), RotatedTokens),
    "tied tokens": (
        OuterBlock((*outer(t=2, R=7, C=3).terms, *tokens().terms)),
        RotatedRows,
    ),
}
WEIGHTS = [None, torch.tensor([0.5, 0.0, 2.0, 1.0, 1.5, 0.3], dtype=F64)]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "weighted"])
@pytest.mark.parametrize("chunk", [1 << 23, 1])
def test_rotated_gradients_are_the_dense_ones_in_the_basis(name, weights, chunk, monkeypatch):
    monkeypatch.setattr("refluence.curvature.kronecker.CHUNK_ELEMENTS", chunk)
    block, kind = BLOCKS[name]
    basis = basis_of((block,))
    Q = matrix_of(basis)
    torch.testing.assert_close(Q.T @ Q, torch.eye(len(Q), dtype=F64))
    expected = block.dense() @ Q
    w = torch.ones(6, dtype=F64) if weights is None else weights
    metric = normal(*basis.values.shape, seed=9).square()
    for same in (block, DenseBlock(block.dense())):
        found = rotated(same, basis, F64)
        assert isinstance(found, kind if same is block else RotatedRows)
        torch.testing.assert_close(found.matrices().flatten(1), expected)
        torch.testing.assert_close(found.norms(metric), expected.square() @ metric.flatten())
        torch.testing.assert_close(found.moment(weights).flatten(), w @ expected.square())
        torch.testing.assert_close(squared_moment(same, basis, weights, F64).flatten(), w @ expected.square())
    vectors = normal(4, block.d)
    torch.testing.assert_close(basis.rotate(vectors).flatten(1), vectors @ Q)
    torch.testing.assert_close(basis.unrotate(basis.rotate(vectors)), vectors)


@pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "weighted"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("t", [1, 3])
def test_several_gradients_an_example_that_share_their_columns(weights, bias, t):
    column = Dense(normal(6, t, 4))
    parts = tuple(OuterBlock((Term(Dense(normal(6, t, 3, seed=s)), column),), bias) for s in range(5))
    own = tuple(OuterBlock((Term(p.terms[0].row, Dense(column.values.clone())),), bias) for p in parts)
    shared, apart = covariances(parts, weights, "expand"), covariances(own, weights, "expand")
    assert shared.count == pytest.approx(apart.count)
    torch.testing.assert_close(shared.rows, apart.rows)
    torch.testing.assert_close(shared.columns, apart.columns)
    basis = kronecker_block(shared, 6, F64)
    expected = sum(squared_moment(part, basis, weights, F64) for part in parts)
    assert (FanBlock(parts).shared is None) == (t > 1)
    for fan in (FanBlock(parts), FanBlock(own)):
        torch.testing.assert_close(squared_moment(fan, basis, weights, F64), expected)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "weighted"])
def test_covariances_add_up_over_any_split(sharing, name, weights, monkeypatch):
    block, _ = BLOCKS[name]
    whole = covariances((block,), weights, sharing)
    monkeypatch.setattr("refluence.curvature.layer_factors.CHUNK_ELEMENTS", 1)
    halves = [
        covariances((block.rows(a, b),), None if weights is None else weights[a:b], sharing)
        for a, b in ((0, 1), (1, 4), (4, 6))
    ]
    total = halves[0].add(halves[1]).add(halves[2])
    assert total.count == pytest.approx(whole.count)
    torch.testing.assert_close(total.rows, whole.rows)
    torch.testing.assert_close(total.columns, whole.columns)


def test_examples_of_different_lengths_count_by_their_positions():
    short, long = outer(b=2, t=2), outer(b=3, t=5, seed=4)
    found = covariances((short,), None, "expand").add(covariances((long,), None, "expand"))
    assert found.count == 2 * 2 + 3 * 5
    columns = torch.cat([b.terms[0].column.vectors().flatten(0, 1) for b in (short, long)])
    torch.testing.assert_close(found.columns / found.count, columns.T @ columns / 19)


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 5),
    t=st.integers(1, 4),
    R=st.integers(1, 5),
    C=st.integers(1, 5),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_eigenvalues_keep_the_trace_and_one_product_is_exact(b, t, R, C, bias, seed):
    block = outer(b, t, R, C, bias, seed)
    basis = basis_of((block,), n=b)
    moment = block.dense().T @ block.dense() / b
    updated = basis.with_values(squared_moment(block, basis, None, F64) / b)
    assert float(updated.values.sum()) == pytest.approx(float(moment.trace()), rel=1e-10)
    if b == t == 1:
        for exact in (basis, updated):
            Q = matrix_of(exact)
            atol = 1e-12 * float(moment.trace())
            torch.testing.assert_close((Q * exact.values.flatten()) @ Q.T, moment, rtol=1e-10, atol=atol)


def test_a_large_vocabulary_is_kept_as_a_vector():
    vocabulary = 300_000
    block = tokens(V=vocabulary)
    assert sides_of((block,)) == (1, 3)
    basis = basis_of((block,))
    assert basis.rows is None
    assert basis.values.shape == (vocabulary, 3)
    found = rotated(block, basis, F64)
    assert isinstance(found, RotatedTokens)
    assert len(found.values) <= 30


def test_a_dense_block_is_its_own_eigenvectors():
    moment = normal(9, 5).T @ normal(9, 5)
    block = dense_block(moment, F64)
    Q = matrix_of(block)
    torch.testing.assert_close((Q * block.values.flatten()) @ Q.T, moment)


def test_no_weight_at_all_is_zero():
    basis = basis_of((outer(),), torch.zeros(6, dtype=F64))
    assert float(basis.values.abs().max()) == 0


# ---------------------------------------------------------------- factors that were not kept


def sequences():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 3))
    return model, (rows(9, 3), labels(9))


@pytest.mark.parametrize("curvature", ["fisher", "mc_fisher"])
def test_factors_of_layers_kept_as_rows_are_made_again(curvature):
    problem = Problem(Case("own", sequences), curvature, batch_size=2)
    layers = layers_of(problem.capture)
    kept = [layer.of(blocks) for _, blocks in problem.curvature.features for layer in layers]
    parts = [part for block in kept for part in getattr(block, "parts", (block,))]
    assert all(isinstance(part, DenseBlock) for part in parts)
    seen = 0
    dense = dict(problem.curvature.features)
    for start, found in factored_batches(problem.curvature, layers):
        for layer, factors in found.items():
            assert factors is not None
            rebuilt = torch.cat([part.dense() for part in factors])
            torch.testing.assert_close(rebuilt, layer.of(dense[start]).dense())
            seen += 1
    assert seen == len(layers) * 3


@pytest.mark.parametrize("bias", [False, True])
def test_factors_that_do_not_give_the_rows_are_not_used(bias):
    block = outer(t=3, bias=bias)
    values = block.dense()
    assert _agree((block,), DenseBlock(values))
    wrong = values.clone()
    wrong[4, -1] += 1e-3
    assert not _agree((block,), DenseBlock(wrong))
    assert not _agree((block,), DenseBlock(values.flip(0)))


def test_a_matrix_of_one_row_is_no_bias():
    basis = KroneckerBlock("kronecker", True, None, None, torch.ones(1, 3, dtype=F64))
    assert torch.equal(basis.matrices(torch.tensor([[1.0, 2.0, 3.0]]))[0, 0], torch.tensor([1.0, 2.0, 3.0]))
