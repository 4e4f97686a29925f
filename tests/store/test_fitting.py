"""A fit with a store: the same numbers, and no gradient made twice."""

import json
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

import refluence as rf
from refluence.errors import NonFiniteError, StoreError
from support.stored import BATCH, SHARD, Counting, K, N, data, fitted, record, shards

TRAIN, TEST = data(N), data(K, seed=2)
PROBED = 32
"""Rows that planning passes through the model, whatever the store holds."""

CASES = {
    "primal": {},
    "dual": {"sketch": rf.sketches.SJLT(128)},
    "kronecker": {"sketch": rf.sketches.Kronecker(8, 8)},
    "blocks": {"blocks": "module"},
    "weights": {"weights": torch.linspace(0, 2, N)},
    "replicates": {"replicates": 3},
    "ggn": {"curvature": "ggn"},
}


@cache
def plain():
    """A fit without a store, made once."""
    return fitted(TRAIN)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "store"
    fitted(TRAIN, path)
    return path


@pytest.fixture
def store(made, tmp_path):
    """A store of the train rows, to be used and harmed."""
    return shutil.copytree(made, tmp_path / "store")


def same(one, other):
    """Bit for bit."""
    a, b = one.score(TEST), other.score(TEST)
    assert torch.equal(a.values, b.values)
    assert (a.error is None) == (b.error is None)
    assert a.error is None or torch.equal(a.error, b.error)
    assert one.damping == other.damping
    assert torch.equal(one.self_influence(), other.self_influence())


@pytest.mark.parametrize("case", CASES)
def test_a_store_changes_no_bit_of_the_scores(case, tmp_path):
    without = fitted(TRAIN, **CASES[case])
    same(fitted(TRAIN, tmp_path / "store", **CASES[case]), without)
    same(fitted(TRAIN, tmp_path / "store", **CASES[case]), without)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_nor_does_where_the_rows_are_held(offload, tmp_path):
    same(fitted(TRAIN, offload=offload), plain())
    for _ in range(2):
        same(fitted(TRAIN, tmp_path / "store", offload=offload), plain())


def test_the_second_fit_makes_no_gradient(store):
    model = Counting()
    again = fitted(TRAIN, store, model=model)
    assert model.rows_seen(TRAIN[0]) == list(range(PROBED))
    assert (record(again)["rows_read"], record(again)["rows_made"]) == (N, 0)
    model.forget()
    again.score(TEST)
    assert model.rows_seen(TRAIN[0]) == []


def test_only_the_rows_of_a_missing_shard_are_made(store):
    shards(store)[3].unlink()
    model = Counting()
    again = fitted(TRAIN, store, model=model)
    assert model.rows_seen(TRAIN[0]) == [*range(PROBED), *range(3 * SHARD, 4 * SHARD)]
    assert record(again)["rows_made"] == SHARD
    same(again, plain())


@pytest.mark.parametrize("harm", ["half", "bit", "empty", "zeros"])
def test_a_damaged_shard_is_named_and_made_again_alone(harm, store):
    before = {path.name: path.read_bytes() for path in shards(store)}
    victim = shards(store)[2]
    content = bytearray(victim.read_bytes())
    if harm == "bit":
        content[len(content) // 2] ^= 4
    left = {"half": content[: len(content) // 2], "empty": b"", "zeros": bytes(len(content))}
    victim.write_bytes(left.get(harm, content))
    with pytest.warns(UserWarning, match=f"{victim.name} .* is damaged"):
        again = fitted(TRAIN, store)
    assert record(again)["damaged"] == [victim.name]
    assert record(again)["rows_made"] == SHARD
    same(again, plain())
    assert {path.name: path.read_bytes() for path in shards(store)} == before


def test_a_shard_under_another_ones_name_is_damaged(store):
    first, second = shards(store)[:2]
    second.write_bytes(first.read_bytes())
    with pytest.warns(UserWarning, match="holds other rows than its name says"):
        same(fitted(TRAIN, store), plain())


# ------------------------------------------------------------------ other rows


def test_added_rows_are_made_and_no_others(store):
    model = Counting()
    longer = data(N + 10)
    more = fitted(longer, store, model=model)
    assert (record(more)["rows_read"], record(more)["rows_made"]) == (N, 10)
    assert model.rows_seen(longer[0]) == [*range(PROBED), *range(N, N + 10)]
    same(more, fitted(longer))
    assert record(fitted(longer, store))["rows_made"] == 0


def test_rows_added_within_a_batch_agree_to_rounding(tmp_path):
    fitted(data(N - 1), tmp_path)
    more = fitted(TRAIN, tmp_path)
    assert record(more)["rows_made"] == 1
    expected = plain().score(TEST).values
    torch.testing.assert_close(more.score(TEST).values, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@settings(deadline=None, max_examples=4)
@given(rows=st.lists(st.integers(0, N - 1), min_size=20, max_size=N))
def test_rows_left_out_moved_or_repeated_are_read(rows, made):
    chosen = tuple(x[rows] for x in TRAIN)
    some = fitted(chosen, made)
    assert record(some)["rows_made"] == 0
    expected = fitted(chosen).score(TEST).values
    torch.testing.assert_close(some.score(TEST).values, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_changed_label_is_another_row(store):
    y = TRAIN[1].clone()
    y[7] = (y[7] + 1) % 3
    changed = fitted((TRAIN[0], y), store)
    assert record(changed)["rows_made"] == 1
    same(changed, fitted((TRAIN[0], y)))


class Rows(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, row):
        return {"x": TRAIN[0][row], "labels": TRAIN[1][row]}


class Named(Counting):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_data_set_read_by_rows_is_resumed_too(loaded, tmp_path):
    train = DataLoader(Rows(), batch_size=BATCH) if loaded else Rows()
    test = {"x": TEST[0], "labels": TEST[1]}
    expected = fitted(train).score(test).values
    assert torch.equal(fitted(train, tmp_path).score(test).values, expected)
    shards(tmp_path)[1].unlink()
    again = fitted(train, tmp_path)
    assert record(again)["rows_made"] == SHARD
    assert torch.equal(again.score(test).values, expected)


# ------------------------------------------------------------------ fingerprints


def changed_model():
    model = Counting()
    model.layers[0].weight.data[0, 0] += 1e-6
    return model


def tripled(output, batch):
    return 3 * torch.nn.functional.cross_entropy(output, batch[1], reduction="none")


DIFFERENCES = {
    "model": ({"model": changed_model()}, "model"),
    "loss": ({"loss": tripled}, "loss: 'cross_entropy' there, 'tripled:"),
    "parameters": ({"blocks": "module"}, "parameters: layers.0"),
    "seed": ({"sketch": rf.sketches.SJLT(32, seed=1)}, "sketch: seed: 0 there, 1 here"),
    "size": ({"sketch": rf.sketches.SJLT(48)}, "sketch: m: 32 there, 48 here"),
    "kind": ({"sketch": rf.sketches.Gaussian(32)}, "sketch: kind: 'SJLT' there, 'Gaussian' here"),
    "stored": ({"store_dtype": torch.float16}, "dtype stored: 'float32' there, 'float16' here"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_store_of_something_else_is_refused_by_the_first_difference(name, store):
    changes, message = DIFFERENCES[name]
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    with pytest.raises(StoreError, match=f"another {message}.* Give another store"):
        fitted(TRAIN, store, **changes)
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


def test_so_is_one_of_another_version(store):
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["fingerprint"]["version of refluence"] = "0.0.9"
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"version of refluence: '0.0.9' there"):
        fitted(TRAIN, store)


def test_a_damaged_manifest_is_named_and_its_shards_survive_it(store):
    (store / "manifest.json").write_text('{"format": "refl')
    with pytest.raises(StoreError, match=r"manifest.json .* is damaged .* delete it"):
        fitted(TRAIN, store)
    (store / "manifest.json").unlink()
    assert record(fitted(TRAIN, store))["rows_made"] == 0


def test_shards_of_another_fingerprint_are_never_read(store, tmp_path):
    fitted(TRAIN, tmp_path / "other", model=changed_model())
    for path in shards(tmp_path / "other"):
        (store / path.name).write_bytes(path.read_bytes())
    again = fitted(TRAIN, store)
    assert record(again)["rows_made"] == N
    same(again, plain())


# ------------------------------------------------------------------ rounding


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_fewer_bytes_make_an_error_that_is_reported(dtype, unit, tmp_path):
    sketch = rf.sketches.SJLT(256)
    exact = fitted(TRAIN, tmp_path / "whole", sketch=sketch)
    first, second = (fitted(TRAIN, tmp_path / "less", sketch=sketch, store_dtype=dtype) for _ in range(2))
    same(first, second)
    rows, kept = exact._fitted().state.projected.rows()["full"], first._fitted().state.projected.rows()["full"]
    measured = float((rows.double() - kept.double()).norm() / rows.double().norm())
    for influence in (first, second):
        assert record(influence)["rounding_error"]["full"] == pytest.approx(measured, rel=1e-12)
    assert 0.1 * unit < measured < unit
    less, whole = (sum(path.stat().st_size for path in shards(tmp_path / name)) for name in ("less", "whole"))
    assert less < 0.7 * whole


def test_float64_gradients_are_stored_whole_unless_asked_otherwise(tmp_path):
    model = Counting().double()
    train, test = ((x.double(), y) for x, y in (TRAIN, TEST))
    expected = fitted(train, model=model).score(test).values
    assert torch.equal(fitted(train, tmp_path / "a", model=model).score(test).values, expected)
    rounded = fitted(train, tmp_path / "b", model=model, store_dtype=torch.float32)
    assert 1e-9 < record(rounded)["rounding_error"]["full"] < 2.0**-24


# ------------------------------------------------------------------ what goes wrong


def test_a_bad_example_is_named_and_what_was_made_before_it_is_stored(tmp_path):
    x = TRAIN[0].clone()
    x[50, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="row 50"):
        fitted((x, TRAIN[1]), tmp_path)
    again = fitted(TRAIN, tmp_path)
    assert (record(again)["rows_read"], record(again)["rows_made"]) == (48, 12)
    same(again, plain())


def test_a_bad_example_within_a_shard_loses_no_batch_before_it(tmp_path):
    x = TRAIN[0].clone()
    x[57, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="row 57"):
        fitted((x, TRAIN[1]), tmp_path)
    again = fitted(TRAIN, tmp_path)
    assert record(again)["rows_read"] == 56
    same(again, plain())


def test_models_of_an_ensemble_have_stores_of_their_own(tmp_path):
    models = [Counting(), changed_model()]
    options = {
        "solver": rf.solvers.Sketched(rf.sketches.SJLT(32)),
        "damping": 1.0,
        "batch_size": BATCH,
        "execution": rf.Execution(store=tmp_path),
        "progress": False,
    }
    for made in (N, 0):
        ensemble = rf.Ensemble.of(rf.Task(models[0]), models, **options).fit(TRAIN)
        assert [record(one)["rows_made"] for one in ensemble.members] == [made, made]


def test_a_sketch_that_grows_has_a_part_for_each_size(tmp_path):
    def fit():
        return rf.Influence(
            rf.Task(Counting()),
            solver=rf.solvers.Sketched(rf.sketches.SJLT(32)),
            damping=1.0,
            accuracy=rf.Accuracy(0.2),
            execution=rf.Execution(store=tmp_path),
            progress=False,
        ).fit(TRAIN)

    first, second = fit(), fit()
    assert len(list(tmp_path.glob("m*/manifest.json"))) >= 2
    assert record(second)["rows_made"] == 0
    assert np.array_equal(first.score(TEST).values, second.score(TEST).values)
