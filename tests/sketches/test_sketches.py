"""Random projections: E[PᵀP] = I, the same P for a seed whatever the work is split into, prefixes and folding."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import refluence as rf
from refluence.errors import RefluenceError
from refluence.gradients.blocks import DenseBlock
from refluence.gradients.factors import Dense, OneHot, Patches, Term
from refluence.gradients.joint import JointBlock
from refluence.gradients.outer import OuterBlock
from refluence.sketches.base import LIFTED_COLUMNS
from refluence.sketches.dense import TILE_COLUMNS, TILE_ROWS
from refluence.sketches.random_bits import mix, random_bits

KINDS = {
    "gaussian": rf.sketches.Gaussian,
    "rademacher": rf.sketches.Rademacher,
    "sjlt": rf.sketches.SJLT,
    "sjlt of four nonzeros": lambda m, seed=0: rf.sketches.SJLT(m, nonzeros=4, seed=seed),
}
kinds = pytest.mark.parametrize("kind", KINDS)
dense_kinds = pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
few = settings(max_examples=15, deadline=None, derandomize=True)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(kind, m=8, seed=0):
    return KINDS[kind](m, seed=seed)


# ---------------------------------------------------------------- law


@kinds
def test_the_mean_of_ptp_is_the_identity_within_standard_errors(kind):
    """300 trials: the stretches of 12 columns of three sketches, each an independent P of d = 12."""
    m, d, trials = 8, 12, 300
    P = torch.stack([make(kind, m, 100 + seed).matrix(d * trials // 3) for seed in range(3)])
    P = P.unflatten(2, (trials // 3, d)).movedim(2, 1).flatten(0, 1)
    products = P.transpose(1, 2) @ P
    off = ~torch.eye(d, dtype=torch.bool)
    error = products.var(dim=0).div(trials).sqrt()
    deviation = products.mean(dim=0) - torch.eye(d, dtype=torch.float64)
    assert (deviation[off].abs() <= 5 * error[off]).all()
    assert (deviation.diagonal().abs() <= 5 * error.diagonal() + 1e-12).all()
    # Var(PᵀP)_ij = 1/m for independent entries of unit variance; the same for a hash into m rows
    torch.testing.assert_close(
        products.var(dim=0)[off].mean() * m, torch.ones((), dtype=torch.float64), rtol=0.1, atol=0
    )


def test_gaussian_entries_are_normal_of_variance_one_over_m():
    P = rf.sketches.Gaussian(200, seed=4).matrix(5000) * 200**0.5
    z = P.flatten()
    k = z.numel()
    assert abs(float(z.mean())) < 5 / k**0.5
    assert abs(float(z.square().mean()) - 1) < 5 * (2 / k) ** 0.5
    assert abs(float(z.pow(4).mean()) - 3) < 5 * (96 / k) ** 0.5


def test_rademacher_entries_are_fair_signs_over_root_m():
    P = rf.sketches.Rademacher(300, seed=4).matrix(5000) * 300**0.5
    torch.testing.assert_close(P.abs(), torch.ones_like(P), rtol=1e-12, atol=0)
    assert abs(float(P.mean())) < 5 / P.numel() ** 0.5
    # neighbouring entries share no bits, within a row or between rows
    for a, b in ((P[:, 1:], P[:, :-1]), (P[1:], P[:-1])):
        assert abs(float((a * b).mean())) < 5 / a.numel() ** 0.5


@pytest.mark.parametrize("nonzeros", [1, 2, 4, 8])
def test_sjlt_has_one_entry_in_every_band_of_every_column(nonzeros):
    m, d = 32, 2000
    P = rf.sketches.SJLT(m, nonzeros=nonzeros, seed=1).matrix(d)
    bands = P.reshape(nonzeros, m // nonzeros, d)
    assert ((bands != 0).sum(dim=1) == 1).all()
    values = P[P != 0]
    torch.testing.assert_close(values.abs(), torch.full_like(values, nonzeros**-0.5))
    assert abs(float(values.sign().mean())) < 5 / values.numel() ** 0.5
    counts = (bands != 0).sum(dim=2).double()
    mean = d * nonzeros / m
    assert float(((counts - mean) ** 2 / mean).sum()) < m + 5 * (2 * m) ** 0.5


@kinds
def test_another_seed_is_another_p(kind):
    assert not torch.equal(make(kind, seed=0).matrix(50), make(kind, seed=1).matrix(50))
    assert torch.equal(make(kind, seed=1).matrix(50), make(kind, seed=0).reseeded(1).matrix(50))
    both = (make(kind, 64, 0).matrix(400) * make(kind, 64, 1).matrix(400)).sum() / 400
    assert abs(float(both)) < 0.5


def test_random_bits_are_a_function_of_seed_stream_and_index():
    device = torch.device("cpu")
    whole = random_bits(3, 5, 0, 100, device)
    assert torch.equal(random_bits(3, 5, 40, 20, device), whole[40:60])
    assert not torch.equal(random_bits(3, 6, 0, 100, device), whole)
    assert not torch.equal(random_bits(4, 5, 0, 100, device), whole)
    bits = (mix(torch.arange(1 << 14))[:, None] >> torch.arange(64)) & 1
    assert ((bits.double().mean(dim=0) - 0.5).abs() < 5 * 0.5 / (1 << 7)).all()


# ---------------------------------------------------------------- one P


@few
@given(
    kind=st.sampled_from(list(KINDS)),
    seed=st.integers(0, 2**62),
    d=st.integers(1, 60),
    chunk=st.integers(1, 70),
    split=st.integers(0, 7),
)
def test_any_chunks_of_columns_and_any_split_of_the_rows_use_the_same_p(kind, seed, d, chunk, split):
    G, sketch = normal(7, d, seed=1), make(kind, 8, seed)
    expected = G @ sketch.matrix(d).T
    out = torch.zeros(7, 8, dtype=torch.float64)
    starts = list(range(0, d, chunk))
    for start in reversed(starts):
        for rows in (slice(0, split), slice(split, 7)):
            if len(G[rows]):
                sketch.accumulate(out[rows], G[rows, start : start + chunk], start)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sketch.project(G), expected, rtol=1e-12, atol=1e-12)


@few
@given(cuts=st.lists(st.integers(1, 9_999), max_size=5, unique=True), kind=st.sampled_from(list(KINDS)))
def test_wide_rows_may_come_in_any_chunks(cuts, kind):
    G, sketch = normal(3, 10_000), make(kind, 48, 3)
    out = torch.zeros(3, 48, dtype=torch.float64)
    for start, stop in reversed(list(itertools.pairwise([0, *sorted(cuts), 10_000]))):
        sketch.accumulate(out, G[:, start:stop], start)
    torch.testing.assert_close(out, sketch.project(G), rtol=0, atol=1e-11)


@kinds
def test_columns_far_out_need_no_columns_before_them(kind):
    out = torch.zeros(1, 48, dtype=torch.float64)
    make(kind, 48).accumulate(out, torch.ones(1, 1, dtype=torch.float64), 3_000_000_000)
    assert 0 < out.square().sum() < 3


@kinds
def test_chunks_whose_examples_are_last_in_memory_use_the_same_p(kind):
    G, sketch = normal(7, 40), make(kind)
    out = torch.zeros(7, 8, dtype=torch.float64)
    sketch.accumulate(out, G[:, :25].T.contiguous().T, 0)
    sketch.accumulate(out, G[:, 25:].T.contiguous().T, 25)
    torch.testing.assert_close(out, sketch.project(G), rtol=1e-12, atol=1e-12)


@kinds
def test_columns_do_not_depend_on_how_many_there_are(kind):
    assert torch.equal(make(kind).matrix(30), make(kind).matrix(200)[:, :30])


@dense_kinds
def test_tiles_meet_without_a_seam(kind):
    """Wider than a tile and higher than one; the dense P and projections of pieces agree."""
    m, d = TILE_ROWS + 5, TILE_COLUMNS + 7
    sketch, G = make(kind, m), normal(3, d)
    whole = sketch.project(G)
    left, right = torch.zeros_like(G), G.clone()
    left[:, : TILE_COLUMNS - 3] = G[:, : TILE_COLUMNS - 3]
    right[:, : TILE_COLUMNS - 3] = 0
    torch.testing.assert_close(sketch.project(left) + sketch.project(right), whole, rtol=1e-10, atol=1e-10)
    P = sketch.matrix(8)
    torch.testing.assert_close(sketch.project(torch.eye(8, d, dtype=torch.float64)).T, P)
    tail = torch.zeros(1, d, dtype=torch.float64)
    tail[0, -1] = 1
    assert not torch.equal(sketch.project(tail)[0, :TILE_ROWS], sketch.project(torch.eye(1, d).double())[0, :TILE_ROWS])


@dense_kinds
def test_the_first_rows_of_a_larger_p_rescaled_are_the_smaller_one(kind):
    large, small = make(kind, 600).matrix(40), make(kind, 37).matrix(40)
    torch.testing.assert_close(large[:37] * (600 / 37) ** 0.5, small, rtol=1e-12, atol=0)


@pytest.mark.parametrize("nonzeros", [1, 4])
@pytest.mark.parametrize("m", [8, 16, 64])
def test_a_folded_sjlt_is_the_smaller_one(nonzeros, m):
    large, small = rf.sketches.SJLT(64, nonzeros, seed=2), rf.sketches.SJLT(m, nonzeros, seed=2)
    G = normal(5, 300)
    torch.testing.assert_close(large.fold(large.project(G), m), small.project(G), rtol=1e-12, atol=1e-12)


@few
@given(band=st.sampled_from([4, 8, 12]), factor=st.sampled_from([2, 3, 4]), nonzeros=st.integers(1, 4))
def test_an_sjlt_folds_to_any_size_that_divides_it(band, factor, nonzeros):
    small = rf.sketches.SJLT(band * nonzeros, nonzeros, seed=9)
    large = rf.sketches.SJLT(band * nonzeros * factor, nonzeros, seed=9)
    G = normal(4, 200)
    torch.testing.assert_close(large.fold(large.project(G), small.m), small.project(G), rtol=0, atol=1e-12)


def test_sjlt_folds_to_sizes_that_divide_it_only():
    sketch = rf.sketches.SJLT(64)
    with pytest.raises(RefluenceError, match="folds to sizes that divide it, not to 24"):
        sketch.fold(torch.zeros(2, 64), 24)


@kinds
def test_single_precision_rows_give_the_same_numbers_to_their_rounding(kind):
    G, sketch = normal(5, 300), make(kind, 16)
    torch.testing.assert_close(sketch.project(G.float()).double(), sketch.project(G), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- blocks


def outer_blocks():
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(9, (6, 4), generator=generator)
    images = Patches(normal(6, 1, 2, 5, 4, seed=5), (2, 3), (1, 2), (2, 1), (1, 1, 0, 2))
    return {
        "one position": OuterBlock((Term(Dense(normal(6, 1, 5)), Dense(normal(6, 1, 7, seed=1))),), True),
        "positions": OuterBlock((Term(Dense(normal(6, 3, 5)), Dense(normal(6, 3, 7, seed=1))),), True),
        "one-hot rows": OuterBlock((Term(OneHot(index, 9, torch.float64), Dense(normal(6, 4, 7))),)),
        "one-hot columns": OuterBlock((Term(Dense(normal(6, 4, 7)), OneHot(index, 9, torch.float64)),)),
        "patches": OuterBlock((Term(Dense(normal(6, images.t, 3)), images),), True),
        "two terms": OuterBlock(
            (
                Term(OneHot(index, 9, torch.float64), Dense(normal(6, 4, 7))),
                Term(Dense(normal(6, 2, 9, seed=2)), Dense(normal(6, 2, 7, seed=3))),
            )
        ),
        "dense": DenseBlock(normal(6, 33)),
    }


@kinds
@pytest.mark.parametrize("name", outer_blocks())
def test_projecting_a_block_is_projecting_its_dense_rows(kind, name, monkeypatch):
    block, sketch = outer_blocks()[name], make(kind, 16, 3)
    expected = block.dense() @ sketch.matrix(block.d).T
    for columns, rows in ((1 << 17, 64), (5, 2), (11, 4)):
        monkeypatch.setattr(type(sketch), "chunk_columns", columns)
        monkeypatch.setattr(type(sketch), "chunk_rows", rows)
        torch.testing.assert_close(sketch.project(block), expected, rtol=1e-12, atol=1e-12)


@kinds
def test_projecting_interleaved_blocks_is_projecting_their_dense_rows(kind):
    """The weight and bias of a layer are one block, but another's weight may lie between them."""
    layer, other = outer_blocks()["one position"], DenseBlock(normal(6, 11, seed=8))
    joint = JointBlock((layer, other), (((0, 35, 0), (35, 5, 46)), ((0, 11, 35),)))
    dense = joint.dense()
    assert torch.equal(dense[:, 35:46], other.dense())
    assert torch.equal(dense[:, 46:], layer.dense()[:, 35:])
    sketch = make(kind, 16, 3)
    torch.testing.assert_close(sketch.project(joint), sketch.project(dense), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: rf.sketches.Gaussian(0), ["at least 1", "0"]),
        (lambda: rf.sketches.SJLT(-4), ["at least 1", "-4"]),
        (lambda: rf.sketches.SJLT(10, nonzeros=4), ["m = 10", "multiple of nonzeros = 4"]),
        (lambda: rf.sketches.SJLT(8, nonzeros=0), ["nonzeros = 0", "at least 1"]),
    ],
)
def test_sketches_that_cannot_be_say_why(make_it, words):
    with pytest.raises(RefluenceError) as error:
        make_it()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("size", [0, -1, 2.5, "8", True])
def test_sizes_that_are_none_are_refused(size):
    # The checker of types that the tests run under speaks first where the type is wrong.
    with pytest.raises((RefluenceError, TypeError), match=r"m of a sketch|parameter 'm'"):
        rf.sketches.Gaussian(size)


@kinds
def test_integer_rows_are_refused(kind):
    with pytest.raises((RefluenceError, TypeError), match=r"floating-point|parameter 'gradients'"):
        make(kind).project(torch.ones(3, 4, dtype=torch.int64))


# ---------------------------------------------------------------- the way back


@kinds
@pytest.mark.parametrize("d", [1, 5, LIFTED_COLUMNS - 1, 2 * LIFTED_COLUMNS + 3])
@pytest.mark.parametrize("k", [0, 1, 6])
def test_lift_is_the_transpose(kind, d, k):
    sketch, values = make(kind, 8, seed=2), normal(8, k, seed=1)
    lifted = sketch.lift(values, d)
    assert lifted.shape == (d, k)
    torch.testing.assert_close(lifted, sketch.matrix(d).T @ values, rtol=1e-12, atol=1e-12)


@kinds
@few
@given(d=st.integers(1, 70), m=st.sampled_from([4, 8, 20]), seed=st.integers(0, 50))
def test_lift_is_adjoint_to_project(kind, d, m, seed):
    sketch, x, y = make(kind, m, seed=seed), normal(3, d, seed=seed), normal(m, 2, seed=seed + 1)
    torch.testing.assert_close(sketch.project(x) @ y, x @ sketch.lift(y, d), rtol=1e-11, atol=1e-11)
