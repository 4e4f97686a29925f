"""A small run of the study, its numbers computed again by other means, and what a second run does."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import refluence as rf
from refluence.errors import DataError
from refluence.studies.folder import StudyFolder
from refluence.studies.leverage_basis import DEFAULTS, run, study, work
from refluence.studies.leverage_basis.images import load_images
from refluence.studies.leverage_basis.trainings import small_network
from refluence.training import Recipe, train
from refluence.training.files import read_tensors

pytestmark = pytest.mark.slow

TINY = replace(
    DEFAULTS["digits"],
    n_train=300,
    n_test=80,
    seeds=2,
    channels=(4, 8),
    embedding=16,
    relu=(20, 10),
    epochs=2,
    dimension=2.0,
    sizes=(20, 100),
    greedy=20,
    hidden=16,
    steps=40,
    convolutional_sizes=(100,),
    convolutional_steps=10,
    early_models=2,
    early_epochs=1,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, run(TINY, folder, progress=False)


@pytest.fixture(scope="module")
def images():
    return load_images(TINY)


def stage(folder, name):
    found = read_tensors(folder / "stages" / f"{name}.safetensors")
    assert found is not None, name
    return found[0], json.loads(found[1]["facts"])


def dense_leverage(X, ridge=0.0):
    X = np.asarray(X, dtype=np.float64)
    inverse = np.linalg.pinv(X.T @ X + len(X) * ridge * np.eye(X.shape[1]), rcond=1e-12, hermitian=True)
    return np.einsum("ij,jk,ik->i", X, inverse, X)


def counted_tau(a, b):
    return float((np.sign(a[:, None] - a) * np.sign(b[:, None] - b)).sum() / (len(a) * (len(a) - 1)))


def embedded(weights, inputs):
    """The hidden layer, with ReLU before the pooling."""
    x = inputs
    for layer in ("first", "second"):
        x = F.conv2d(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"], padding=1)
        x = F.max_pool2d(F.relu(x), 2)
    return F.relu(F.linear(x.flatten(1), weights["embedding.weight"], weights["embedding.bias"]))


def test_the_folder_holds_everything(done):
    folder, summary = done
    names = ["accuracy", "heatmaps", "overlap", "curves", "digits", "labels", "artefact"]
    tables = ["results", "accuracy", "agreement", "groups", "bases"]
    expected = [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for name in [*expected, *(f"{name}.parquet" for name in tables), "report.html", "manifest.json"]:
        assert (folder / name).stat().st_size > 1_000 or name == "manifest.json", name
    assert json.loads((folder / "manifest.json").read_text())["status"] == "complete"
    written = json.loads((folder / "summary.json").read_text())
    assert all(not isinstance(value, dict) for value in written.values())
    assert {key for key, value in written.items() if value is not None} <= set(summary)
    report = (folder / "report.html").read_text()
    assert report.count("data:image/png") == len(names)
    assert "the checkpoints published with it have these letters permuted" in report


def test_pixels_are_those_of_the_data_set_and_only_train_rows_are_selected(done, images):
    bunch = load_digits()
    known = {row.tobytes() for row in bunch.data / 16}
    assert all(row.tobytes() in known for row in images.pixels.numpy())
    assert (images.n_train, len(images.labels)) == (300, 380)
    orders, _ = stage(done[0], "greedy")
    assert all(int(order.max()) < 300 for order in orders.values())


def test_leverage_of_pixels_and_embeddings(done, images):
    folder, summary = done
    weights, _ = stage(folder, "network/regression_2")
    features = {"raw": images.pixels, "regression_2": embedded(weights, images.inputs).double()}
    for name, X in features.items():
        found, facts = stage(folder, f"basis/{name}")
        np.testing.assert_allclose(found["plain_all"], dense_leverage(X), rtol=0, atol=1e-6)
        np.testing.assert_allclose(found["plain_train"], dense_leverage(X[:300]), rtol=0, atol=1e-6)
        np.testing.assert_allclose(found["ridge_all"], dense_leverage(X, facts["damping_all"]), rtol=0, atol=1e-8)
        assert float(found["ridge_train"].sum()) == pytest.approx(2.0, rel=1e-6)
        assert facts["rank_all"] == np.linalg.matrix_rank(X.numpy())
    assert summary["rank_raw_smallest"] == np.linalg.matrix_rank(images.pixels.numpy())


def test_agreement_is_counted_over_pairs_of_images_and_seeds(done):
    folder, summary = done
    names = {group: [f"{group}_{seed}" for seed in (1, 2)] for group in ("classification", "regression")}
    for kind in ("plain", "ridge"):
        scores = {
            name: stage(folder, f"basis/{name}")[0][f"{kind}_all"].numpy() for own in names.values() for name in own
        }
        a, b = (scores[name] for name in names["classification"])
        assert summary[f"tau_{kind}_classification_classification"] == pytest.approx(counted_tau(a, b), abs=1e-6)
        top = [set(np.argsort(-each, kind="stable")[: summary["top"]]) for each in (a, b)]
        chance = summary["top"] / 380
        kappa = (len(top[0] & top[1]) / summary["top"] - chance) / (1 - chance)
        assert summary[f"kappa_{kind}_classification_classification"] == pytest.approx(kappa)
        same = np.mean([counted_tau(scores[f"classification_{s}"], scores[f"regression_{s}"]) for s in (1, 2)])
        assert summary[f"tau_{kind}_classification_regression_same_seed"] == pytest.approx(same, abs=1e-6)
    pairs = pd.read_parquet(folder / "agreement.parquet")
    bases = pd.read_parquet(folder / "bases.parquet")["basis"].tolist()
    assert len(bases) == 9
    expected = [(kind, *pair) for kind in ("plain", "ridge") for pair in combinations(bases, 2)]
    assert list(pairs[["kind", "a", "b"]].itertuples(index=False, name=None)) == expected
    np.testing.assert_allclose(pairs["swap_fraction"], (1 - pairs["tau"]) / 2)


def test_a_linear_head_is_ridge_regression_on_the_rows_of_its_arm(done, images):
    results = pd.read_parquet(done[0] / "results.parquet")
    X, y = images.pixels.numpy(), images.labels.numpy()
    rows = np.argsort(-dense_leverage(X[:300]).round(9), kind="stable")[:100]
    chosen, targets = X[rows], np.eye(10)[y[rows]]
    centred = chosen - chosen.mean(axis=0)
    gram = centred.T @ centred / 100
    B = np.linalg.solve(gram + 0.01 * np.trace(gram) / 64 * np.eye(64), centred.T @ targets / 100)
    outputs = (X - chosen.mean(axis=0)) @ B + targets.mean(axis=0)
    right = outputs.argmax(axis=1) == y
    [found] = results[
        (results[["model", "basis", "arm"]] == ["linear head", "raw", "raw_top"]).all(axis=1) & (results["k"] == 100)
    ].to_dict("records")
    assert found["train_accuracy"] == pytest.approx(right[rows].mean(), abs=0.011)
    assert found["test_accuracy"] == pytest.approx(right[300:].mean(), abs=0.013)


def test_a_network_of_the_results_is_that_of_a_training_alone(done, images):
    results = pd.read_parquet(done[0] / "results.parquet")
    own = results[(results["model"] == "network") & (results["k"] == 100)]
    assert own.groupby("arm")["seed"].apply(list).map(lambda seeds: seeds == [1, 2]).all()
    assert "raw_d_optimal" not in set(own["arm"])
    x, y = images.train
    task = rf.Task(small_network(8, 16))
    recipe = Recipe(1e-3, 1, 64, optimizer="adam", steps=40)
    rows = rf.select(torch.ones(300), 100, "random", seed=2).indices
    model = train(task, (x, y), recipe, rows=rows, seed=2, progress=False)
    with torch.no_grad():
        right = (model(images.test[0]).argmax(dim=1) == images.test[1]).double().mean()
    [found] = own[(own["arm"] == "random") & (own["seed"] == 2)]["test_accuracy"]
    assert found == pytest.approx(float(right), abs=0.026)


def test_intervals_are_students_over_seeds(done):
    folder, summary = done
    results = pd.read_parquet(folder / "results.parquet")
    own = results[(results["model"] == "network") & (results["arm"] == "random") & (results["k"] == 20)][
        "test_accuracy"
    ]
    a, b = own
    half = 12.706204736432095 * abs(a - b) / 2  # Student's 97.5 % point of one degree of freedom
    assert summary["accuracy_network_random_20"] == pytest.approx((a + b) / 2)
    assert summary["accuracy_network_random_20_high"] == pytest.approx((a + b) / 2 + half)


def test_a_lost_stage_comes_back_the_same(done):
    lost = [done[0] / "stages" / name for name in ("network/classification_1.safetensors", "networks/20.safetensors")]
    kept = [read_tensors(path) for path in lost]
    for path in lost:
        path.unlink()
    again = work.Work(StudyFolder(done[0], "leverage-basis", TINY.record()), TINY, progress=False)
    assert len(again.networks) == 4
    again.accuracies()
    for path, before in zip(lost, kept, strict=True):
        after = read_tensors(path)
        assert all(torch.allclose(after[0][name], before[0][name], atol=1e-6) for name in before[0])
        facts = [{**json.loads(each[1]["facts"]), "seconds": 0} for each in (before, after)]
        assert facts[0] == facts[1]


def test_a_second_run_computes_nothing_and_writes_the_same(done, monkeypatch):
    folder, summary = done

    def refuse(*args, **kwargs):
        raise AssertionError("computed again")

    for name in ("trained", "network_results", "leverages", "head_results", "greedy_orders", "early_models", "compare"):
        monkeypatch.setattr(work, name, refuse)
    monkeypatch.setattr(study, "_figures", lambda *args: {})  # they take most of the time, and the first run draws them
    again = run(TINY, folder, progress=False)
    assert list(again) == list(summary)
    numbers = {name for name, value in summary.items() if isinstance(value, float) and name != "seconds"}
    assert len(numbers) > 500
    for name in set(summary) - {"seconds"}:
        expected = pytest.approx(summary[name], nan_ok=True) if name in numbers else summary[name]
        assert again[name] == expected, name


def test_other_settings_are_refused(done):
    with pytest.raises(DataError, match="epochs 2, not 3"):
        run(replace(TINY, epochs=3), done[0], progress=False)


def test_a_basis_of_low_rank_names_the_remedy(tmp_path):
    with pytest.raises(DataError, match="smaller --dimension"):
        run(replace(TINY, dimension=70.0), tmp_path / "other", progress=False)


def test_options_refuse_what_cannot_be_studied():
    with pytest.raises(DataError, match="2 at the least"):
        replace(TINY, seeds=1)
    with pytest.raises(DataError, match="sizes must be numbers of rows"):
        replace(TINY, sizes=(0, 10))
