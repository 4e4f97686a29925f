"""Sketches of both factors of a layer's gradients: their P by definition, the same from factors as from formed rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import refluence as rf
from refluence.batches import Batches
from refluence.errors import PlanError, RefluenceError
from refluence.gradients.blocks import DenseBlock, ZeroBlock
from refluence.gradients.capture import Capture
from refluence.gradients.factors import Dense, OneHot, Patches, Term
from refluence.gradients.fan import FanBlock
from refluence.gradients.groups import parameter_groups
from refluence.gradients.joint import JointBlock
from refluence.gradients.matrices import LayerMatrix
from refluence.gradients.outer import OuterBlock
from refluence.sketches import kronecker, tensor
from support.models import CASES, N

MA, ME, M = 4, 3, 12
KINDS = {
    "kronecker": lambda seed=0: rf.sketches.Kronecker(MA, ME, seed=seed),
    "gaussian kronecker": lambda seed=0: rf.sketches.Kronecker(MA, ME, seed=seed, orthogonal=False),
    "tensor": lambda seed=0: rf.sketches.TensorSketch(M, seed=seed),
}
kinds = pytest.mark.parametrize("kind", KINDS)
few = settings(max_examples=15, deadline=None, derandomize=True)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(R, C, bias=True, outer=True, at=0, names=("weight", "bias")):
    """One layer whose columns lie side by side."""
    return LayerMatrix(names if bias else names[:1], R, C, bias, outer, ((0, R * C + R * bias, at),))


def by_entry(sketch, R, C, at):
    """P of the layer with bias that stands at a column, as (m, R, C + 1): the bias is the last column of the matrix."""
    layers = [layer(at, 1, bias=False), layer(R, C, at=at)] if at else [layer(R, C)]
    P = sketch.on(layers).matrix(at + R * C + R)[:, at:]
    return torch.cat([P[:, : R * C].reshape(-1, R, C), P[:, R * C :, None]], dim=2)


# ---------------------------------------------------------------- P by definition


def kronecker_factors(sketch, R, C, at=0):
    """(P_E, P_A) of P_E ⊗ P_A, each up to a scale: from (row of P_E, r) to (row of P_A, c) the product has rank one."""
    P = by_entry(sketch, R, C, at)
    arranged = P.reshape(sketch.m_e, sketch.m_a, R, C + 1).permute(0, 2, 1, 3)
    U, s, Vh = torch.linalg.svd(arranged.reshape(sketch.m_e * R, -1))
    assert float(s[1]) < 1e-12 * float(s[0])
    return U[:, 0].reshape(sketch.m_e, R) * float(s[0]) ** 0.5, Vh[0].reshape(sketch.m_a, C + 1) * float(s[0]) ** 0.5


@pytest.mark.parametrize("at", [0, 35])
@pytest.mark.parametrize(("m_a", "m_e"), [(4, 3), (40, 5), (4, 50), (31, 40)])
def test_the_factors_of_a_kronecker_sketch_are_scaled_orthogonal(at, m_a, m_e):
    R, C = 40, 30
    for factor in kronecker_factors(rf.sketches.Kronecker(m_a, m_e, seed=2), R, C, at):
        rows, columns = factor.shape
        gram = factor @ factor.T if rows <= columns else factor.T @ factor
        torch.testing.assert_close(gram / gram[0, 0], torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-11)
    P = by_entry(rf.sketches.Kronecker(m_a, m_e, seed=2), R, C, at)
    assert float(P.square().sum()) == pytest.approx(R * (C + 1), rel=1e-12)


@pytest.mark.parametrize("at", [0, 35])
def test_a_gaussian_kronecker_sketch_is_the_product_of_two_gaussian_factors(at):
    R, C = 40, 30
    sketch = rf.sketches.Kronecker(MA, ME, seed=2, orthogonal=False)
    for factor in kronecker_factors(sketch, R, C, at):
        k = factor.numel()
        entries = factor.flatten() / factor.square().mean() ** 0.5
        assert abs(float(entries.mean())) < 5 / k**0.5
        assert abs(float(entries.pow(4).mean()) - 3) < 5 * (96 / k) ** 0.5
    # ‖P‖² = ‖P_E‖²‖P_A‖², of mean R(C+1), each factor a χ² of as many degrees of freedom as it has entries
    spread = (2 / (ME * R) + 2 / (MA * (C + 1))) ** 0.5
    norm = float(by_entry(sketch, R, C, at).square().sum())
    assert abs(norm / (R * (C + 1)) - 1) < 5 * spread


@pytest.mark.parametrize("at", [0, 35])
def test_a_tensor_sketch_is_a_countsketch_whose_hashes_add(at):
    R, C = 9, 8
    P = by_entry(rf.sketches.TensorSketch(M, seed=2), R, C, at)
    assert ((P != 0).sum(dim=0) == 1).all()
    places, signs = P.abs().argmax(dim=0), P.sum(dim=0)
    assert torch.equal(signs.abs(), torch.ones(R, C + 1, dtype=torch.float64))
    assert not bool(((places - places[:1] - places[:, :1] + places[0, 0]) % M).any())
    assert torch.equal(signs, signs[:1] * signs[:, :1] * signs[0, 0])
    assert len(places.unique()) == M


@kinds
def test_the_mean_of_ptp_is_the_identity_within_standard_errors(kind):
    """Two layers in one block, 1,000 seeds: also between layers, whose sketches are added."""
    layers = [layer(2, 2), layer(3, 1, at=6, names=("w", "b"))]
    trials, d = 1000, 12
    P = torch.stack([KINDS[kind](seed).on(layers).matrix(d) for seed in range(trials)])
    products = P.transpose(1, 2) @ P
    error = products.var(dim=0).div(trials).sqrt()
    deviation = products.mean(dim=0) - torch.eye(d, dtype=torch.float64)
    assert (deviation.abs() <= 4.5 * error + 1e-12).all()
    assert float(error.max()) < 0.06


@pytest.mark.parametrize("orthogonal", [True, False])
def test_the_second_moment_of_a_kronecker_norm_is_that_of_its_factors(orthogonal):
    """E‖P_E e‖⁴ of a unit e: 1 + 2/m for Gaussian entries (χ²), R(m+2)/(m(R+2)) for orthogonal rows (a Beta law)."""
    R, C, trials = 5, 6, 1500
    e, a = (torch.nn.functional.normalize(normal(1, 1, k, seed=k), dim=2) for k in (R, C))
    block = OuterBlock((Term(Dense(e), Dense(a)),))
    sketches = (rf.sketches.Kronecker(MA, ME, seed, orthogonal) for seed in range(trials))
    fourth = torch.stack([sketch.project(block).square().sum() for sketch in sketches]).square()
    expected = 1.0
    for m, k in ((ME, R), (MA, C)):
        expected *= k * (m + 2) / (m * (k + 2)) if orthogonal else 1 + 2 / m
    assert abs(float(fourth.mean()) - expected) < 4.5 * float(fourth.std()) / trials**0.5


@kinds
def test_layers_and_seeds_have_independent_p(kind):
    first, second = layer(6, 5), layer(6, 5, at=36)
    P = KINDS[kind]().on([first, second]).matrix(72)
    assert not torch.equal(P[:, :36], P[:, 36:])
    assert torch.equal(P[:, :36], KINDS[kind]().on([first]).matrix(36))
    assert not torch.equal(P, KINDS[kind](1).on([first, second]).matrix(72))
    assert torch.equal(KINDS[kind](1).on([first]).matrix(36), KINDS[kind]().reseeded(1).on([first]).matrix(36))


# ---------------------------------------------------------------- factors and rows


def outer_blocks():
    index = torch.randint(9, (6, 4), generator=torch.Generator().manual_seed(0))
    images = Patches(normal(6, 1, 2, 5, 4, seed=5), (2, 3), (1, 2), (2, 1), (1, 1, 0, 2))
    lines = Patches(normal(6, 2, 3, 9, seed=6), (3,), (2,), (1,), (1, 0))
    return {
        "one position": OuterBlock((Term(Dense(normal(6, 1, 5)), Dense(normal(6, 1, 7, seed=1))),), True),
        "no bias": OuterBlock((Term(Dense(normal(6, 1, 5)), Dense(normal(6, 1, 7, seed=1))),)),
        "positions": OuterBlock((Term(Dense(normal(6, 3, 5)), Dense(normal(6, 3, 7, seed=1))),), True),
        "one-hot rows": OuterBlock((Term(OneHot(index, 9, torch.float64), Dense(normal(6, 4, 7))),)),
        "one-hot columns": OuterBlock((Term(Dense(normal(6, 4, 7)), OneHot(index, 9, torch.float64)),), True),
        "patches": OuterBlock((Term(Dense(normal(6, images.t, 3)), images),), True),
        "patches of groups of lines": OuterBlock((Term(Dense(normal(6, lines.t, 4)), lines),), True),
        "two terms": OuterBlock(
            (
                Term(OneHot(index, 9, torch.float64), Dense(normal(6, 4, 7))),
                Term(Dense(normal(6, 2, 9, seed=2)), Dense(normal(6, 2, 7, seed=3))),
            )
        ),
    }


def layer_of(block, at=0):
    return layer(block.R, block.C, block.bias, at=at)


def assert_projects_its_rows(sketch, block):
    P = sketch.matrix(block.d)
    torch.testing.assert_close(sketch.project(block), block.dense() @ P.T, rtol=1e-12, atol=1e-12)


@kinds
@pytest.mark.parametrize("name", outer_blocks())
def test_projecting_factors_is_projecting_formed_rows(kind, name, monkeypatch):
    block = outer_blocks()[name]
    sketch = KINDS[kind](3).on([layer_of(block)])
    torch.testing.assert_close(sketch.project(block), KINDS[kind](3).project(block), rtol=0, atol=0)
    for elements in (1 << 23, 1, 200):
        monkeypatch.setattr(kronecker, "CHUNK_ELEMENTS", elements)
        monkeypatch.setattr(tensor, "CHUNK_ELEMENTS", elements)
        assert_projects_its_rows(sketch, block)
    assert_projects_its_rows(sketch, DenseBlock(block.dense()))


@kinds
def test_several_gradients_an_example_are_projected_each(kind):
    fed = Dense(normal(6, 3, 7, seed=1))
    parts = tuple(OuterBlock((Term(Dense(normal(6, 3, 5, seed=c)), fed),), True) for c in range(4))
    sketch = KINDS[kind]().on([layer_of(parts[0])])
    assert_projects_its_rows(sketch, FanBlock(parts))
    assert_projects_its_rows(sketch, FanBlock((parts[0], DenseBlock(parts[1].dense()), parts[2])))


@kinds
def test_interleaved_layers_are_projected_where_their_columns_are(kind):
    """The weight and bias of a layer are one block, but another's weight may lie between them."""
    first = outer_blocks()["one position"]
    second = OuterBlock((Term(Dense(normal(6, 2, 3, seed=8)), Dense(normal(6, 2, 4, seed=9))),))
    unused = ZeroBlock(6, 8, normal(8))
    columns = (((0, 35, 0), (35, 5, 47)), ((0, 12, 35),), ((0, 8, 52),))
    joint = JointBlock((first, second, unused), columns)
    layers = [
        LayerMatrix(("a", "b"), 5, 7, True, True, columns[0]),
        LayerMatrix(("c",), 3, 4, False, True, columns[1]),
        LayerMatrix(("d",), 2, 4, False, True, columns[2]),
    ]
    sketch = KINDS[kind](5).on(layers)
    assert_projects_its_rows(sketch, joint)
    rows = JointBlock(tuple(DenseBlock(block.dense()) for block in joint.blocks), columns)
    assert_projects_its_rows(sketch, rows)
    torch.testing.assert_close(sketch.project(joint.dense()), sketch.project(joint), rtol=1e-12, atol=1e-12)
    values = normal(M, 3, seed=4)
    torch.testing.assert_close(sketch.lift(values, 60), sketch.matrix(60).T @ values, rtol=1e-12, atol=1e-12)


@kinds
@few
@given(cut=st.integers(1, 5), R=st.integers(1, 6), C=st.integers(1, 6), t=st.integers(1, 4), bias=st.booleans())
def test_the_same_on_every_batch_split(kind, cut, R, C, t, bias):
    block = OuterBlock((Term(Dense(normal(6, t, R)), Dense(normal(6, t, C, seed=1))),), bias)
    sketch = KINDS[kind](7)
    parts = [sketch.project(block.rows(first, last)) for first, last in ((0, cut), (cut, 6))]
    torch.testing.assert_close(torch.cat(parts), sketch.project(block), rtol=1e-12, atol=1e-12)


@kinds
@few
@given(R=st.integers(1, 6), C=st.integers(1, 6), bias=st.booleans(), seed=st.integers(0, 50))
def test_lift_is_adjoint_to_project(kind, R, C, bias, seed):
    sketch = KINDS[kind](seed).on([layer(R, C, bias)])
    d = R * C + R * bias
    x, y = normal(3, d, seed=seed), normal(M, 2, seed=seed + 1)
    torch.testing.assert_close(sketch.project(x) @ y, x @ sketch.lift(y, d), rtol=1e-11, atol=1e-11)


@kinds
def test_single_precision_factors_give_the_same_numbers_to_their_rounding(kind):
    rows, columns = normal(6, 3, 50), normal(6, 3, 70, seed=1)
    double = OuterBlock((Term(Dense(rows), Dense(columns)),), True)
    single = OuterBlock((Term(Dense(rows.float()), Dense(columns.float())),), True)
    found = KINDS[kind]().project(single)
    assert found.dtype == torch.float32
    scale = float(double.squared_norms().max()) ** 0.5
    torch.testing.assert_close(found.double(), KINDS[kind]().project(double), rtol=0, atol=3e-6 * scale)


@kinds
def test_gradients_too_long_to_be_formed_are_projected(kind):
    """10⁵ tokens by 3·10⁴ columns: 24 GB a formed gradient."""
    tokens = OneHot(torch.tensor([[3, 99_999], [3, 5]]), 100_000, torch.float64)
    block = OuterBlock((Term(tokens, Dense(normal(2, 2, 30_000))),))
    found = KINDS[kind]().project(block)
    again = KINDS[kind]().project(block.rows(1, 2))
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found[1:], again, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- every kind of layer


@pytest.mark.parametrize("kind", ["kronecker", "tensor"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_every_model_is_projected_like_its_rows_or_refused_by_name(kind, name):
    task, batch = CASES[name].task(), CASES[name].build()[1]
    groups = parameter_groups(task.model, task.parameter_names(), "full")
    capture = Capture(task, task.model, groups, Batches(batch))
    layers = capture.matrices("full")
    assert sum(len(one.names) for one in layers) == len(task.parameter_names())
    others = [key for one in layers if not one.outer for key in one.names]
    if kind == "kronecker" and others:
        with pytest.raises(PlanError) as error:
            KINDS[kind]().on(layers)
        assert all(key in str(error.value) for key in others)
        return
    sketch = KINDS[kind](2).on(layers)
    for size in (N, 2):
        for _, blocks in capture.gradients(Batches(batch, size), capture.loss):
            assert_projects_its_rows(sketch, blocks["full"])


@pytest.mark.parametrize("name", ["linear", "linear on sequences", "conv2d stride", "embedding", "self-attention"])
def test_models_of_weight_matrices_have_a_kronecker_sketch(name):
    """So that the test above does not pass by refusing them."""
    task, batch = CASES[name].task(), CASES[name].build()[1]
    groups = parameter_groups(task.model, task.parameter_names(), "full")
    assert all(one.outer for one in Capture(task, task.model, groups, Batches(batch)).matrices("full"))


# ---------------------------------------------------------------- errors


@kinds
def test_plain_rows_have_no_layers(kind):
    for ask in (lambda s: s.project(normal(2, 12)), lambda s: s.lift(normal(M, 1), 12), lambda s: s.matrix(12)):
        with pytest.raises(RefluenceError, match=r"cannot tell the layers in plain rows: give gradient blocks"):
            ask(KINDS[kind]())


@pytest.mark.parametrize(("arguments", "word"), [((0, 4), "m_a"), ((4, -1), "m_e"), ((4, 4, -1), "seed")])
def test_sizes_that_are_none_are_refused(arguments, word):
    with pytest.raises(RefluenceError, match=f"{word} of a sketch must be an integer"):
        rf.sketches.Kronecker(*arguments)


def test_the_size_of_a_kronecker_sketch_is_the_product():
    sketch = rf.sketches.Kronecker(8, 4, seed=3)
    assert sketch.m == 32
    assert repr(sketch) == "Kronecker(m_a=8, m_e=4, seed=3, orthogonal=True)"
    assert sketch == rf.sketches.Kronecker(8, 4, seed=3).on([layer(2, 3)])
