"""A store of the sums of Kronecker factors: a stretch of rows is summed once."""

import shutil

import pytest
import torch
from torch import nn

import refluence as rf
from refluence.errors import NonFiniteError, PlanError, StoreError
from refluence.store import describe, prune, verify
from refluence.store.places import open_place
from support.cli import run
from support.stored import SHARD, Counting, K, N, data, fitted, record

PROBED = 32
KFAC, EKFAC = rf.solvers.Kfac(), rf.solvers.Ekfac()


def doubles(n, seed=1):
    x, y = data(n, seed)
    return x.double(), y


TRAIN, TEST = doubles(N), doubles(K, seed=2)


def network():
    return Counting().double()


def fit(store=None, train=TRAIN, solver=EKFAC, **options):
    options.setdefault("model", network())
    options.setdefault("damping", 0.1)
    return fitted(train, store, solver=solver, **options)


def close(one, other):
    for a, b in ((one.score(TEST).values, other.score(TEST).values), (one.self_influence(), other.self_influence())):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * float(b.abs().max()))


def same(one, other):
    """Bit for bit."""
    assert torch.equal(one.score(TEST).values, other.score(TEST).values)


def counts(influence):
    """(rows read, rows made) of the covariances and of the eigenvalues."""
    return [(part["rows_read"], part["rows_made"]) for part in record(influence)]


def sums(store):
    """The files of the sums, by kind."""
    parts = [part for part in describe(open_place(store)).parts if "sums" in part.fingerprint]
    return {part.fingerprint["sums"]: sorted((store / part.name).glob("*.zarr.zip")) for part in parts}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "store"
    fit(path)
    return path


@pytest.fixture
def store(made, tmp_path):
    """A store of the sums over the train rows, to be used and harmed."""
    return shutil.copytree(made, tmp_path / "store")


class Normed(Counting):
    """With a layer taken whole and, in a convolution, positions."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            convolution = nn.Conv1d(1, 3, 3)
            self.layers = nn.Sequential(
                nn.Unflatten(1, (1, 6)), convolution, nn.Flatten(), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 3)
            )


CASES = {
    "kfac": {"solver": KFAC},
    "weights": {"weights": torch.linspace(0, 2, N), "damping": rf.RelativeDamping(20.0)},
    "samples": {"curvature": "mc_fisher"},
    "sketch": {"solver": rf.solvers.Kfac(sketch=rf.sketches.Kronecker(4, 4))},
    "norms": {"solver": rf.solvers.Ekfac(), "model": Normed().double()},
    "diagonals": {"solver": rf.solvers.Kfac(dense_limit=5, factor_limit=10), "model": Normed().double()},
    "positions": {"solver": rf.solvers.Ekfac(sharing="reduce"), "model": Normed().double(), "blocks": "module"},
}


@pytest.mark.parametrize("case", CASES)
def test_stored_sums_are_those_of_the_rows(case, tmp_path):
    options = CASES[case]
    first, second = (fit(tmp_path / "store", **options) for _ in range(2))
    close(first, fit(**options))
    same(second, first)
    for passed in counts(first):
        assert passed == (0, N)
    for passed in counts(second):
        assert passed == (N, 0)


def test_the_second_fit_makes_no_gradient(store):
    model = network()
    again = fit(store, model=model)
    assert model.rows_seen(TRAIN[0]) == list(range(PROBED))
    assert counts(again) == [(N, 0), (N, 0)]


def test_a_new_store_costs_no_further_pass(tmp_path):
    passed = []
    for store in (None, tmp_path):
        model = network()
        fit(store, model=model).score(TEST)
        passed.append(sum(len(rows) for rows in model.seen))
    assert passed[0] == passed[1]


def test_kfac_and_ekfac_share_their_covariances(store):
    assert counts(fit(store, solver=KFAC)) == [(N, 0)]


@pytest.mark.parametrize("kind", ["covariances", "eigenvalues"])
def test_only_the_rows_of_a_missing_stretch_are_passed_through_the_model(kind, store):
    sums(store)[kind][3].unlink()
    model = network()
    again = fit(store, model=model)
    assert model.rows_seen(TRAIN[0]) == [*range(PROBED), *range(3 * SHARD, 4 * SHARD)]
    assert sorted(counts(again)) == [(N - SHARD, SHARD), (N, 0)]
    same(again, fit(store))


def test_a_damaged_stretch_is_named_and_summed_again_alone(store):
    expected = fit(store)
    victim = sums(store)["covariances"][2]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{victim.name} .* is damaged .* summed again"):
        again = fit(store)
    assert counts(again) == [(N - SHARD, SHARD), (N, 0)]
    assert record(again)[0]["damaged"] == [victim.name]
    same(again, expected)


def test_an_interrupted_fit_goes_on_after_the_stretches_that_are_there(tmp_path):
    x = TRAIN[0].clone()
    x[50, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="row 50"):
        fit(tmp_path, train=(x, TRAIN[1]))
    again = fit(tmp_path)
    assert counts(again) == [(48, 12), (0, N)]
    close(again, fit())


@pytest.mark.parametrize("n", [N + 10, N - SHARD])
def test_more_or_fewer_rows_cost_their_own_stretches(n, store):
    """The eigenvalues are those of another basis, and summed anew."""
    train = doubles(n)
    other = fit(store, train=train)
    assert counts(other) == [(min(n, N), max(0, n - N)), (0, n)]
    close(other, fit(train=train))


def test_a_changed_row_or_weight_costs_its_own_stretch(store):
    y = TRAIN[1].clone()
    y[20] = (y[20] + 1) % 3
    assert counts(fit(store, train=(TRAIN[0], y)))[0] == (N - SHARD, SHARD)
    weights = torch.ones(N)
    fit(store, weights=weights)
    weights[59] = 0.5
    changed = fit(store, weights=weights)
    assert counts(changed)[0] == (N - SHARD, SHARD)
    close(changed, fit(weights=weights))


def test_what_else_decides_the_sums_has_sums_of_its_own(store):
    assert counts(fit(store, solver=rf.solvers.Kfac(factor_limit=100))) == [(0, N)]
    assert counts(fit(store, solver=rf.solvers.Kfac(sketch=rf.sketches.Kronecker(4, 4)))) == [(0, N)]
    assert counts(fit(store, solver=KFAC, curvature="mc_fisher")) == [(0, N)]
    assert counts(fit(store, solver=KFAC, curvature="ggn")) == [(0, N)]
    assert counts(fit(store, solver=KFAC)) == [(N, 0)]


def test_sampled_labels_are_those_of_a_place(tmp_path):
    fit(tmp_path, solver=KFAC, curvature="mc_fisher")
    moved = tuple(x.roll(SHARD, 0) for x in TRAIN)
    again = fit(tmp_path, train=moved, solver=KFAC, curvature="mc_fisher")
    assert counts(again) == [(0, N)]
    close(again, fit(train=moved, solver=KFAC, curvature="mc_fisher"))


def test_a_store_of_another_model_is_refused(store):
    model = network()
    model.layers[0].weight.data[0, 0] += 1e-6
    with pytest.raises(StoreError, match=r"another model.* Give another store"):
        fit(store, model=model)


@pytest.mark.parametrize("execution", [{"offload": "disk"}, {"store_dtype": torch.float16}])
def test_there_are_no_rows_to_hold_or_round(execution, tmp_path):
    store = tmp_path if "store_dtype" in execution else None
    with pytest.raises(PlanError, match=r"is about rows of gradients, and solver Ekfac holds none"):
        fit(store, **execution)


def test_a_preconditioner_has_its_sums_in_the_store_of_the_rows(tmp_path):
    solver = rf.solvers.ConjugateGradient(rtol=1e-12, preconditioner=EKFAC)
    first, model = fit(tmp_path, solver=solver), network()
    second = fit(tmp_path, solver=solver, model=model)
    assert model.rows_seen(TRAIN[0]) == list(range(PROBED))
    same(second, first)
    close(first, fit(solver=rf.solvers.Dense()))


# ------------------------------------------------------------------ looking after


def test_info_and_verify_know_the_sums(store):
    assert {kind: len(files) for kind, files in sums(store).items()} == {"covariances": 5, "eigenvalues": 5}
    assert verify(open_place(store)) == []
    assert "10 of 10 files are whole" in run("store", "verify", store).output
    assert "factors/" in run("store", "info", store).output
    victim = sums(store)["eigenvalues"][1]
    victim.write_bytes(victim.read_bytes()[:100])
    assert f"{victim.name}: damaged" in run("store", "verify", store, code=1).output


def test_prune_takes_the_eigenvalues_of_older_bases_and_nothing_else(store):
    before = sums(store)
    fit(store, weights=torch.linspace(0, 2, N), train=doubles(N))
    files = prune(open_place(store))
    assert {damage.why for damage in files} == {"of an older basis"}
    assert {path.name for path in before["eigenvalues"]} < {damage.name.rpartition("/")[2] for damage in files}
    assert counts(fit(store)) == [(N, 0), (0, N)]
    assert counts(fit(store, weights=torch.linspace(0, 2, N))) == [(N, 0), (N, 0)]


def test_prune_leaves_what_a_fit_reads(store):
    (sums(store)["covariances"][0].parent / ".half.zarr.zip.abc.part").write_bytes(b"half")
    assert [damage.why for damage in prune(open_place(store))] == ["temporary"]
    assert counts(fit(store)) == [(N, 0), (N, 0)]
