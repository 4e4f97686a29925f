"""A store of whole gradients: every solver reads them, and makes none twice."""

import shutil

import pytest
import torch
from torch import nn

import refluence as rf
from refluence.errors import NonFiniteError, PlanError, StoreError
from refluence.store import describe, prune, verify
from refluence.store.places import open_place
from support.stored import BATCH, SHARD, Counting, K, N, data, fitted, record, shards

PROBED = 32
"""Rows that planning passes through the model, whatever the store holds."""
S = rf.solvers
SOLVERS = {
    "gram": S.Gram(),
    "dense": S.Dense(),
    "identity": S.Identity(),
    "harmonic mean": S.HarmonicMean(),
    "arnoldi": S.Arnoldi(20),
    "nystroem": S.Nystroem(20),
    "conjugate gradient": S.ConjugateGradient(rtol=1e-12),
    "preconditioned": S.ConjugateGradient(rtol=1e-12, preconditioner=S.Kfac()),
}


def doubles(n, seed=1):
    x, y = data(n, seed)
    return x.double(), y


TRAIN, TEST = doubles(N), doubles(K, seed=2)


def network():
    return Counting().double()


def fit(solver, store=None, train=TRAIN, **options):
    options.setdefault("model", network())
    options.setdefault("damping", 0.1)
    return fitted(train, store, solver=solver, **options)


def close(one, other, tolerance=1e-10):
    expected = other.score(TEST).values
    torch.testing.assert_close(one.score(TEST).values, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    expected = other.self_influence()
    torch.testing.assert_close(one.self_influence(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def same(one, other):
    """Bit for bit."""
    assert torch.equal(one.score(TEST).values, other.score(TEST).values)
    assert torch.equal(one.self_influence(), other.self_influence())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "store"
    fit(S.Gram(), path)
    return path


@pytest.fixture
def store(made, tmp_path):
    """A store of the train rows, to be used and harmed."""
    return shutil.copytree(made, tmp_path / "store")


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_reads_its_rows_and_makes_none(name, store):
    solver = SOLVERS[name]
    model = network()
    first = fit(solver, store, model=model)
    assert (record(first)["rows_read"], record(first)["rows_made"]) == (N, 0)
    preconditioned = name == "preconditioned"
    assert model.rows_seen(TRAIN[0]) == list(range(N if preconditioned else PROBED))
    model.forget()
    close(first, fit(solver))
    assert model.rows_seen(TRAIN[0]) == []
    same(fit(solver, store), fit(solver, store))


CASES = {
    "blocks": {"blocks": "module", "offload": "disk"},
    "weights": {"weights": torch.linspace(0, 2, N), "offload": "cpu", "damping": rf.RelativeDamping(20.0)},
    "hessian": {"curvature": "hessian", "solver": S.Dense(), "damping": 1.0, "offload": "disk"},
    "sampled": {"solver": S.Lissa(batch_size=20, depth=5), "offload": "disk"},
    "pairs": {"solver": S.HarmonicMean(), "offload": "disk", "memory": 2 * 10**6},
}


@pytest.mark.parametrize("case", CASES)
def test_the_rows_are_the_same_under_every_curvature_and_wherever_they_are_held(case, tmp_path):
    options = {"solver": S.Gram(), **CASES[case]}
    without = fit(**{name: value for name, value in options.items() if name not in ("offload", "memory")})
    close(fit(**options), without)
    first, second = (fit(**options, store=tmp_path / "store") for _ in range(2))
    assert (record(first)["rows_made"], record(second)["rows_made"]) == (N, 0)
    close(first, without)
    same(second, first)


class Apart(nn.Linear):
    """A layer whose bias does not stand beside its weight."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        bias = self.bias
        del self.bias
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, outputs))
        self.bias = bias

    def forward(self, x):
        return super().forward(x) * self.scale


def test_layers_find_their_columns_where_weight_and_bias_stand_apart(tmp_path):
    model = network()
    model.layers[0] = Apart(6, 8).double()
    assert [name for name, _ in model.named_parameters()][:3] == [f"layers.0.{p}" for p in ("weight", "scale", "bias")]
    solver = S.ConjugateGradient(rtol=1e-12, preconditioner=S.Ekfac())
    close(fit(solver, tmp_path, model=model), fit(S.Dense(), model=model))


# ------------------------------------------------------------------ other rows


def test_only_the_rows_of_a_missing_shard_are_made(store):
    expected = fit(S.Gram(), store)
    shards(store)[3].unlink()
    model = network()
    again = fit(S.Gram(), store, model=model)
    assert model.rows_seen(TRAIN[0]) == [*range(PROBED), *range(3 * SHARD, 4 * SHARD)]
    same(again, expected)


def test_an_interrupted_fit_goes_on_from_its_shards(tmp_path):
    x = TRAIN[0].clone()
    x[50, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="row 50"):
        fit(S.Gram(), tmp_path, train=(x, TRAIN[1]))
    again = fit(S.Gram(), tmp_path)
    assert (record(again)["rows_read"], record(again)["rows_made"]) == (48, 12)
    close(again, fit(S.Gram()))


def test_added_rows_are_made_and_left_out_ones_are_not(store):
    longer = doubles(N + 10)
    more = fit(S.Gram(), store, train=longer)
    assert (record(more)["rows_read"], record(more)["rows_made"]) == (N, 10)
    close(more, fit(S.Gram(), train=longer))
    some = tuple(x[torch.arange(N) % 3 > 0] for x in TRAIN)
    fewer = fit(S.Gram(), store, train=some)
    assert record(fewer)["rows_made"] == 0
    close(fewer, fit(S.Gram(), train=some))


def test_a_damaged_shard_is_named_and_made_again_alone(store):
    expected = fit(S.Gram(), store)
    victim = shards(store)[2]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{victim.name} .* is damaged"):
        again = fit(S.Gram(), store)
    assert (record(again)["damaged"], record(again)["rows_made"]) == ([victim.name], SHARD)
    same(again, expected)


def test_models_of_an_ensemble_have_rows_of_their_own(tmp_path):
    models = [network(), network()]
    models[1].layers[0].weight.data[0, 0] += 0.1
    options = {"solver": S.Gram(), "damping": 0.1, "batch_size": BATCH, "progress": False}
    for made in (N, 0):
        ensemble = rf.Ensemble.of(rf.Task(models[0]), models, execution=rf.Execution(store=tmp_path), **options)
        assert [record(one)["rows_made"] for one in ensemble.fit(TRAIN).members] == [made, made]
    for one, alone in zip(ensemble.members, models, strict=True):
        close(one, fit(S.Gram(), model=alone))


# ------------------------------------------------------------------ what may be together


def test_rows_and_projected_rows_are_different_stores(store, tmp_path):
    with pytest.raises(StoreError, match="another sketch: 'none, whole gradients' there"):
        fitted(TRAIN, store, model=network())
    fitted(TRAIN, tmp_path / "sketched", model=network())
    with pytest.raises(StoreError, match=r"another sketch: .*SJLT.* there, 'none, whole gradients' here"):
        fit(S.Gram(), tmp_path / "sketched")


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_fewer_bytes_make_an_error_that_is_reported(dtype, unit, tmp_path):
    exact = fit(S.Gram())
    first, second = (fit(S.Gram(), tmp_path, store_dtype=dtype) for _ in range(2))
    same(second, first)
    whole = torch.cat([blocks["full"].dense() for _, blocks in exact._fitted().rows])
    kept = torch.cat([blocks["full"].dense() for _, blocks in first._fitted().rows])
    measured = float((whole - kept).norm() / whole.norm())
    for influence in (first, second):
        assert record(influence)["rounding_error"]["full"] == pytest.approx(measured, rel=1e-12)
    assert 0.1 * unit < measured < unit


# ------------------------------------------------------------------ the plan


def plan(solver, **execution):
    influence = rf.Influence(
        rf.Task(network()), solver=solver, damping=0.1, batch_size=BATCH, execution=rf.Execution(**execution)
    )
    return influence.plan_for(TRAIN, n_test=K)


def test_the_plan_counts_the_rows_unless_they_are_on_the_disk(tmp_path):
    d = sum(p.numel() for p in network().parameters())
    identity = S.Identity()
    held, mapped = plan(identity, offload="cpu"), plan(identity, offload="disk")
    assert held.memory - mapped.memory == pytest.approx(8 * N * d)
    assert plan(identity, store=tmp_path).memory == held.memory
    assert plan(S.Kfac(), store=tmp_path).memory == plan(S.Kfac()).memory


def test_rows_that_do_not_fit_are_refused_with_the_remedy(tmp_path):
    memory = int(plan(S.Identity(), offload="disk").memory) + 1000
    with pytest.raises(PlanError, match=r'offload="disk"\) holds the 60 × 83 train gradients in a mapped file'):
        plan(S.Identity(), store=tmp_path, memory=memory).check()
    plan(S.Identity(), store=tmp_path, memory=memory, offload="disk").check()


# ------------------------------------------------------------------ looking after


def test_info_verify_and_prune_know_the_rows(store):
    [part] = describe(open_place(store)).parts
    assert (part.name, part.rows, part.fingerprint["sketch"]) == ("", N, "none, whole gradients")
    assert verify(open_place(store)) == []
    assert prune(open_place(store)) == []
    victim = shards(store)[1]
    victim.write_bytes(b"half")
    assert [damage.name for damage in prune(open_place(store))] == [victim.name]
    assert record(fit(S.Gram(), store))["rows_made"] == SHARD
