"""λ by number, by ratio to the mean eigenvalue, by effective dimension, and by the library's rule."""

import pytest
import torch
from torch import nn

import refluence as rf
from refluence.damping import auto_dimension
from refluence.errors import RefluenceError
from support.reference import columns_of, curvature, effective_dimension, loop_gradients

N, D = 40, 31
SOLVERS = {"gram": rf.solvers.Gram(), "dense": rf.solvers.Dense()}
GROUPS = {"0": ["0.weight", "0.bias"], "2": ["2.weight", "2.bias"]}


@pytest.fixture(scope="module")
def model():
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.fixture(scope="module")
def train():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(N, 3, generator=generator, dtype=torch.float64), torch.randint(3, (N,), generator=generator)


@pytest.fixture(scope="module")
def C(model, train):
    def loss(m, batch):
        return nn.functional.cross_entropy(m(batch[0]), batch[1], reduction="none")

    return curvature(loop_gradients(model, loss, [name for name, _ in model.named_parameters()], train))


@pytest.fixture(scope="module")
def parts(model, C):
    """The curvature of each module alone."""
    names = [name for name, _ in model.named_parameters()]
    return {
        group: C[columns][:, columns]
        for group, columns in zip(GROUPS, columns_of(model, names, GROUPS.values()), strict=True)
    }


def fitted(model, train, damping, solver="gram", l2=0.0, **options):
    task = rf.Task(model, l2=l2)
    return rf.Influence(task, solver=SOLVERS.get(solver, solver), damping=damping, **options).fit(train)


solvers = pytest.mark.parametrize("solver", SOLVERS)


@solvers
def test_a_number_is_the_damping_in_units_of_the_curvature(model, train, solver):
    influence = fitted(model, train, 0.03, solver)
    assert influence.damping == 0.03
    assert influence.shifts == {"full": 0.03}
    assert fitted(model, train, 1, solver).damping == 1.0


@solvers
def test_relative_damping_is_a_share_of_the_mean_eigenvalue(model, train, C, solver):
    influence = fitted(model, train, rf.RelativeDamping(0.2), solver, l2=0.05)
    expected = 0.2 * float(C.trace()) / D
    assert influence.damping == pytest.approx(expected, rel=1e-10)
    assert influence.shifts == {"full": pytest.approx(expected + 0.05, rel=1e-10)}


@solvers
def test_relative_damping_is_of_each_block_its_own(model, train, parts, solver):
    influence = fitted(model, train, rf.RelativeDamping(0.2), solver, blocks="module")
    expected = {group: 0.2 * float(part.trace()) / len(part) for group, part in parts.items()}
    assert influence.damping == pytest.approx(expected, rel=1e-10)
    dimension = sum(effective_dimension(part, expected[group]) for group, part in parts.items())
    assert influence.effective_dimension == pytest.approx(dimension, rel=1e-8)


@solvers
@pytest.mark.parametrize("dimension", [0.5, 3.0, 12.0])
def test_the_damping_for_an_effective_dimension_gives_it(model, train, C, solver, dimension):
    influence = fitted(model, train, rf.EffectiveDimension(dimension), solver)
    assert influence.effective_dimension == pytest.approx(dimension, rel=1e-6)
    assert effective_dimension(C, influence.damping) == pytest.approx(dimension, rel=1e-6)


@solvers
def test_over_blocks_one_damping_gives_the_sum_of_their_dimensions(model, train, parts, solver):
    influence = fitted(model, train, rf.EffectiveDimension(6), solver, blocks="module")
    assert isinstance(influence.damping, float)
    total = sum(effective_dimension(part, influence.damping) for part in parts.values())
    assert total == pytest.approx(6, rel=1e-6)


@solvers
def test_l2_is_part_of_what_gives_an_effective_dimension(model, train, solver):
    without = fitted(model, train, rf.EffectiveDimension(6), solver).damping
    influence = fitted(model, train, rf.EffectiveDimension(6), solver, l2=0.3 * without)
    assert influence.damping == pytest.approx(0.7 * without, rel=1e-6)
    assert influence.effective_dimension == pytest.approx(6, rel=1e-6)


def test_an_effective_dimension_that_l2_alone_undercuts_is_refused(model, train):
    with pytest.raises(RefluenceError, match=r"no damping ≥ 0 gives an effective dimension of 6.*l2 = 5.*smaller"):
        fitted(model, train, rf.EffectiveDimension(6), l2=5.0)


def test_an_effective_dimension_above_the_rank_is_refused_with_the_rank(model, train, C):
    rank = int(torch.linalg.matrix_rank(C))
    with pytest.raises(RefluenceError, match=rf"between 0 and the rank, {rank}"):
        fitted(model, train, rf.EffectiveDimension(D + 1))


@pytest.mark.parametrize("blocks", ["full", "module"])
def test_the_automatic_damping_is_one_rule_whatever_the_exact_solver(model, train, blocks):
    gram, dense = (fitted(model, train, "auto", solver, blocks=blocks) for solver in SOLVERS)
    assert gram.damping == pytest.approx(dense.damping, rel=1e-8)
    assert gram.effective_dimension == pytest.approx(min(N / 16, D / 16), rel=1e-6)


def test_the_automatic_damping_of_a_wide_corrected_sketch_is_near_the_exact_one(model, train):
    exact = fitted(model, train, "auto").damping
    sketched = fitted(model, train, "auto", rf.solvers.Sketched(rf.sketches.Gaussian(512))).damping
    assert sketched == pytest.approx(exact, rel=0.2)


def test_the_automatic_damping_is_none_where_l2_is_enough(model, train):
    influence = fitted(model, train, "auto", l2=10.0)
    assert influence.damping == 0.0
    assert influence.shifts == {"full": 10.0}


def test_the_automatic_dimension_is_a_sixteenth_of_the_smaller_side_up_to_a_limit():
    assert auto_dimension(1600, 10**6) == 100
    assert auto_dimension(10**6, 320) == 20
    assert auto_dimension(10**9, 10**9) == 2048


@pytest.mark.parametrize("damping", [rf.RelativeDamping(0.3), rf.EffectiveDimension(4), "auto", 0.02])
@pytest.mark.parametrize("blocks", ["full", "module"])
def test_at_resolves_a_damping_as_a_fresh_fit_does(model, train, damping, blocks):
    at = fitted(model, train, 0.5, blocks=blocks).at(damping)
    fresh = fitted(model, train, damping, blocks=blocks)
    assert at.damping == pytest.approx(fresh.damping, rel=1e-9)
    torch.testing.assert_close(at.score(train).values, fresh.score(train).values, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf"), "automatic"])
def test_a_damping_that_is_none_is_refused_with_what_there_is(model, train, damping):
    with pytest.raises(RefluenceError, match=r'damping must be a number ≥ 0.*"auto", or a dict .* not'):
        rf.Influence(rf.Task(model), damping=damping)
    with pytest.raises(RefluenceError, match=r'damping must be a number ≥ 0.*"auto", or a dict .* not'):
        fitted(model, train, 0.1).at(damping)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_ratios_and_dimensions_must_be_positive(value):
    with pytest.raises(RefluenceError, match="ratio > 0, not"):
        rf.RelativeDamping(value)
    with pytest.raises(RefluenceError, match="dimension > 0, not"):
        rf.EffectiveDimension(value)


# ---------------------------------------------------------------- one for each block


@solvers
def test_a_dict_gives_every_block_its_own_number(model, train, parts, solver):
    influence = fitted(model, train, {"0": 0.5, "2": 1e-3}, solver, blocks="module", l2=0.01)
    assert influence.damping == {"0": 0.5, "2": 1e-3}
    assert influence.shifts == {"0": 0.51, "2": 0.011}
    expected = sum(effective_dimension(part, influence.shifts[group]) for group, part in parts.items())
    assert influence.effective_dimension == pytest.approx(expected, rel=1e-8)
    assert influence.score(train).target_damping == {"0": 0.5, "2": 1e-3}


@solvers
def test_rules_in_a_dict_hold_for_the_block_alone(model, train, parts, solver):
    dampings = {"0": rf.EffectiveDimension(3), "2": rf.RelativeDamping(0.2)}
    influence = fitted(model, train, dampings, solver, blocks="module", l2=0.01)
    found = influence.damping
    assert effective_dimension(parts["0"], found["0"] + 0.01) == pytest.approx(3, rel=1e-6)
    assert found["2"] == pytest.approx(0.2 * float(parts["2"].trace()) / len(parts["2"]), rel=1e-10)


@solvers
def test_auto_in_a_dict_goes_by_the_blocks_own_size(model, train, parts, solver):
    influence = fitted(model, train, {"0": "auto", "2": 0.3}, solver, blocks="module")
    wanted = min(N / 16, len(parts["0"]) / 16)
    assert effective_dimension(parts["0"], influence.damping["0"]) == pytest.approx(wanted, rel=1e-6)
    assert influence.damping["2"] == 0.3


def test_a_dict_of_equal_dampings_is_one_number(model, train):
    influence = fitted(model, train, {"0": 0.2, "2": 0.2}, blocks="module")
    assert influence.damping == 0.2
    assert fitted(model, train, {"full": 0.2}).damping == 0.2


def test_at_takes_a_dict_and_gives_what_a_fresh_fit_does(model, train):
    dampings = {"2": rf.RelativeDamping(0.4), "0": 0.02}  # in any order
    at = fitted(model, train, 0.5, blocks="module").at(dampings)
    fresh = fitted(model, train, dampings, blocks="module")
    assert at.damping == pytest.approx(fresh.damping, rel=1e-12)
    torch.testing.assert_close(at.score(train).values, fresh.score(train).values, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("damping", "words"),
    [
        ({"0": 0.1, "1": 0.1, "2": 0.1}, r"names the blocks \['1'\], which do not exist: the blocks are \['0', '2'\]"),
        ({"0": 0.1}, r"no value for the blocks \['2'\]"),
        ({}, r"no value for the blocks \['0', '2'\]"),
        ({"0": 0.1, "2": {"0": 1.0}}, "damping of block '2' is a dict: give a number or a rule"),
        ({"0": 0.1, "2": -0.1}, "must be a number ≥ 0"),
    ],
)
def test_a_dict_must_name_every_block_and_no_other(model, train, damping, words):
    with pytest.raises(RefluenceError, match=words):
        rf.Influence(rf.Task(model), damping=damping, blocks="module")
    with pytest.raises(RefluenceError, match=words):
        fitted(model, train, 0.1, blocks="module").at(damping)


# ---------------------------------------------------------------- other curvatures


@pytest.mark.parametrize("curvature", ["ggn", "hessian", "true_fisher", "mc_fisher"])
def test_rules_are_of_the_curvature_in_use(model, train, curvature):
    dense = fitted(model, train, 0.1, "dense", curvature=curvature)
    matrix = dense._fit.curvature.dense()["full"]
    values = torch.linalg.eigvalsh(matrix).clamp(min=0)
    found = dense.at(rf.EffectiveDimension(2)).damping
    assert float((values / (values + found)).sum()) == pytest.approx(2, rel=1e-6)
    automatic = dense.at("auto").damping
    assert float((values / (values + automatic)).sum()) == pytest.approx(min(N, D) / 16, rel=1e-6)
    trace = float(matrix.trace())
    if trace > 0:
        assert dense.at(rf.RelativeDamping(0.3)).damping == pytest.approx(0.3 * trace / D, rel=1e-9)


def test_relative_damping_of_a_hessian_with_a_negative_trace_is_refused(train):
    x, _ = train

    def falling(output, batch):
        return -output.square().sum(dim=1)

    task = rf.Task(nn.Linear(3, 2).double(), loss=falling)
    with pytest.raises(RefluenceError, match=r"positive trace, and that of block 'full' is -.*\"ggn\" or \"fisher\""):
        rf.Influence(
            task, "hessian", rf.solvers.Dense(), damping=rf.RelativeDamping(0.1), batch_size=16, progress=False
        ).fit((x, x))
