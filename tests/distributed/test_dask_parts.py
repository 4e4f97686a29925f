"""Every solver on the workers of a cluster against one process, and some against dense references."""

import pytest
import torch

import refluence as rf
from refluence.accuracy import Accuracy
from refluence.distributed import dask_parts
from refluence.distributed.dask_parts import DaskParts
from refluence.distributed.placement import Placement
from refluence.distributed.trees import moved
from refluence.store import held
from support import grouped
from support.clustered import SKETCHED, TEST, N, Network, data, influence
from support.curvatures import DenseReference
from support.grouped import SOLVERS, results
from support.reference import loop_gradients

distributed = pytest.importorskip("distributed", reason="a cluster needs refluence[distributed]")

LAMBDA = 0.1


@pytest.fixture(scope="module")
def client():
    """Two workers, which are threads of this process."""
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0", silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as made,
    ):
        yield made


def close(found, expected, rtol=1e-8):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


QUICK = ("sketched", "wide sketch", "gram", "ekfac", "nystroem")


# Of conjugate gradients much is made on the client, slowly; the dense solution below is theirs too.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in SOLVERS
        if name != "conjugate gradient"
    ],
)
def test_workers_give_what_one_process_gives(client, name):
    here = results(grouped.fitted(name))
    there = results(grouped.fitted(name, cluster=client))
    assert there.keys() == here.keys()
    for key, expected in here.items():
        close(there[key], expected)


@pytest.mark.parametrize(
    ("curvature", "solver"),
    [
        ("fisher", rf.solvers.Gram()),
        ("fisher", rf.solvers.Dense()),
        ("ggn", rf.solvers.Dense()),
        ("ggn", rf.solvers.ConjugateGradient(rtol=1e-12)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_workers_give_the_dense_solution(client, curvature, solver):
    model = Network()
    names = [name for name, _ in model.named_parameters()]
    weights = torch.linspace(0.5, 2.0, N, dtype=torch.float64)
    dense = DenseReference(model, names, "cross_entropy", data(), weights=weights)
    C = dense.curvature(curvature)
    V = loop_gradients(model, lambda m, part: dense.losses(m(part[0]), part), names, TEST)
    expected = weights * (V @ torch.linalg.solve(C + LAMBDA * torch.eye(len(C)), dense.gradients.T))
    fitted = influence(client, solver=solver, curvature=curvature, damping=LAMBDA).fit(data(), weights=weights)
    close(fitted.score(TEST).values, expected)


@pytest.mark.parametrize("rows", [16, 17, 64, 500])
def test_the_size_of_stretches_changes_rounding_only(client, rows):
    expected = influence().fit(data()).score(TEST).values
    close(influence(client, shard_rows=rows).fit(data()).score(TEST).values, expected, 1e-10)


def test_another_damping_of_the_same_fit(client):
    fitted = influence(client).fit(data())
    expected = influence(damping=1e-3).fit(data())
    close(fitted.at(1e-3).score(TEST).values, expected.score(TEST).values)


@pytest.mark.parametrize("damping", [rf.RelativeDamping(10.0), rf.EffectiveDimension(5.0), "auto"])
def test_damping_that_asks_the_curvature(client, damping):
    there, here = influence(client, damping=damping).fit(data()), influence(damping=damping).fit(data())
    close(torch.tensor(list(there.shifts.values())), torch.tensor(list(here.shifts.values())))
    close(there.score(TEST).values, here.score(TEST).values)


def test_scores_to_a_folder(client, tmp_path):
    stored = influence(client).fit(data()).score(TEST, out=tmp_path / "scores")
    close(stored.load().values, influence().fit(data()).score(TEST).values)


def test_a_sketch_that_grows_for_an_accuracy(client):
    options = {"solver": rf.solvers.Sketched(rf.sketches.SJLT(8, seed=3)), "damping": 1.0}
    options["accuracy"] = Accuracy(0.3)
    there, here = influence(client, **options).fit(data()), influence(**options).fit(data())
    assert there.plan.solver == here.plan.solver
    close(there.score(TEST).values, here.score(TEST).values)


def test_errors_of_replicates(client):
    solver = rf.solvers.Sketched(rf.sketches.SJLT(32, seed=3), replicates=3)
    there, here = (influence(c, solver=solver).fit(data()).score(TEST) for c in (client, None))
    close(there.values, here.values)
    close(there.error, here.error)


def test_a_loader_of_data(client):
    close(influence(client).fit(data).score(TEST).values, influence().fit(data()).score(TEST).values)


def test_the_recipe_is_unpickled_once_a_fit_and_arguments_once_a_pass(client, monkeypatch):
    from refluence.distributed import worker

    seen = []

    class Counted:
        @staticmethod
        def loads(given):
            seen.append(len(given))
            return pickle.loads(given)

    import pickle

    monkeypatch.setattr(worker, "pickle", Counted)
    fitted = influence(client, shard_rows=16).fit(data())
    stretches = -(-N // 16)
    recipe = max(seen)
    assert seen.count(recipe) == 1  # both workers are of one process
    passes = len(seen) - 1
    assert passes < stretches
    seen.clear()
    fitted.score(TEST)
    assert 1 <= len(seen) < stretches


def test_a_pass_leaves_its_arguments_as_they_are(client):
    sketch = SKETCHED
    fitted = influence(client, solver=sketch, shard_rows=16).fit(data())
    first = fitted.score(TEST).values
    assert torch.equal(fitted.score(TEST).values, first)


def test_lost_results_are_asked_for_again(client, monkeypatch):
    expected = influence(client).fit(data()).score(TEST).values
    submit, lost = DaskParts._submit, []

    def losing(self, i, *more):
        future = submit(self, i, *more)
        if i == 2 and not lost:
            lost.append(future)
            self.client.cancel(future, force=True)
        return future

    monkeypatch.setattr(DaskParts, "_submit", losing)
    assert torch.equal(influence(client).fit(data()).score(TEST).values, expected)
    assert lost


def test_results_that_are_always_lost_end_the_run(client, monkeypatch):
    def losing(self, i, *more):
        future = submit(self, i, *more)
        self.client.cancel(future, force=True)
        return future

    submit = DaskParts._submit
    monkeypatch.setattr(DaskParts, "_submit", losing)
    monkeypatch.setattr(dask_parts, "SECONDS_FOR_NEWS", 0.0)
    with pytest.raises(rf.errors.ClusterError, match="died 9 times"):
        influence(client).fit(data())


class TestPlacement:
    def test_stretches_are_shared_out_by_threads(self):
        assert Placement({"a": 1, "b": 3}, 8).homes == ["a"] * 2 + ["b"] * 6
        assert Placement({"a": 1, "b": 1}, 3).most == 2

    def test_homes_stay_while_their_workers_live(self):
        placement = Placement({"a": 1, "b": 1}, 4)
        placement.renew({"a": 1, "b": 1, "c": 1})
        assert placement.homes == ["a", "a", "b", "b"]

    def test_the_stretches_of_a_dead_worker_go_to_those_with_the_fewest(self):
        placement = Placement({"a": 1, "b": 1}, 4)
        placement.renew({"a": 1, "c": 1})
        assert placement.homes == ["a", "a", "c", "c"]
        placement.renew({"a": 1})
        assert placement.homes == ["a"] * 4
        placement.renew({})
        assert placement.homes == ["a"] * 4


def test_trees_are_moved_only_where_they_must_be():
    tree = {"a": [torch.ones(2), 3], "b": (None, torch.zeros(1))}
    assert moved(tree, torch.device("cpu")) is tree


def test_stretches_read_the_labels_of_their_own_shards_and_find_rows_that_moved(client, tmp_path, monkeypatch):
    read, real = [], held.read_label
    monkeypatch.setattr(held, "read_label", lambda place, name: read.append(name) or real(place, name))
    (x, y), tests = grouped.data(160, 1), grouped.data(grouped.K, 2)

    def fitted(rows, **execution):
        solver = rf.solvers.Sketched(rf.sketches.SJLT(96))
        given = {"solver": solver, "damping": 0.5, "batch_size": 16, "progress": False}
        return rf.Influence(grouped.task(), **given, execution=rf.Execution(**execution)).fit(rows)

    there = {"cluster": client, "store": tmp_path, "shard_rows": 16}
    report = fitted((x, y), **there).diagnostics["store"]
    assert (report["rows_read"], report["rows_made"]) == (0, 160)
    # A stretch may be dropped between two passes and read again; all labels for every stretch would be 45.
    assert len(read) <= 10
    read.clear()
    report = fitted((x, y), **there).diagnostics["store"]
    assert (report["rows_read"], report["rows_made"]) == (160, 0)
    assert 10 <= len(read) <= 40  # not 100
    moved_on = fitted((x[5:], y[5:]), **there)
    report = moved_on.diagnostics["store"]
    assert (report["rows_read"], report["rows_made"]) == (155, 0)
    close(moved_on.score(tests).values, fitted((x[5:], y[5:])).score(tests).values)
