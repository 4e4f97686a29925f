"""Scores that are written some tests at a time and read from their folder."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import refluence as rf
from refluence import scoring, stored_scores
from refluence.errors import DataError, RefluenceError
from support.stored import BATCH, Counting, K, data, fitted

N = 40
TRAIN, TEST = data(N), data(K, seed=2)
SOLVERS = {
    "exact": rf.solvers.Gram(),
    "with errors": rf.solvers.Sketched(rf.sketches.SJLT(32)),
    "dual": rf.solvers.Sketched(rf.sketches.SJLT(64)),
    "iterative": rf.solvers.ConjugateGradient(rtol=1e-12),
}


@pytest.fixture(params=[1, 2, 100])
def tile(request, monkeypatch):
    """So many tests at a time, and no more."""
    original = scoring.added_scores

    def limited(fit, tests, *rest):
        assert tests.n <= request.param
        return original(fit, tests, *rest)

    monkeypatch.setattr(scoring, "tile_size", lambda tests, n: request.param)
    monkeypatch.setattr(scoring, "added_scores", limited)
    return request.param


@pytest.fixture(scope="module", params=SOLVERS)
def influence(request):
    return rf.Influence(
        rf.Task(Counting().double()), solver=SOLVERS[request.param], damping=1.0, batch_size=BATCH, progress=False
    ).fit(tuple(x.double() if x.is_floating_point() else x for x in TRAIN))


@pytest.fixture(scope="module")
def tests():
    return TEST[0].double(), TEST[1]


def close(one, other):
    assert (one is None) == (other is None)
    if one is not None:
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_they_are_the_scores_in_memory(influence, tests, tile, tmp_path):
    expected = influence.score(tests)
    stored = influence.score(tests, out=tmp_path / "scores")
    assert isinstance(stored, rf.StoredScores)
    assert stored.shape == expected.shape
    for found in (stored.load(), rf.Scores.load(tmp_path / "scores")):
        close(found.values, expected.values)
        close(found.error, expected.error)
        assert found.n_train == N
        assert found.target_damping == expected.target_damping
        assert np.array_equal(found.test_ids, expected.test_ids)
    for k in (1, 3, 10, 12):
        for end in ("top", "bottom"):
            pd.testing.assert_frame_equal(getattr(stored, end)(k), getattr(expected, end)(k), rtol=1e-8, atol=1e-12)


def test_weights_and_groups_and_no_errors(tests, tile, tmp_path):
    sketched = fitted(tuple(x.double() if x.is_floating_point() else x for x in TRAIN), model=Counting().double())
    options = {"weights": torch.linspace(-1, 1, N), "groups": ["a", "b"] * (N // 2), "errors": False}
    expected = sketched.score(tests, **options)
    stored = sketched.score(tests, out=tmp_path / "scores", **options)
    assert list(stored.train_ids) == ["a", "b"]
    close(stored.load().values, expected.values)
    pd.testing.assert_frame_equal(stored.top(2), expected.top(2), rtol=1e-8)
    assert stored.load().error is None
    assert stored.manifest["groups"] == "given labels"


def test_some_rows_and_tiles(influence, tests, tmp_path, monkeypatch):
    stored = influence.score(tests, out=tmp_path / "scores")
    with pytest.raises(DataError, match=f"no test row {K}: the scores have {K}"):
        stored.rows([0, K])
    some = stored.rows([3, 0])
    whole = stored.load()
    assert torch.equal(some.values, whole.values[[3, 0]])
    assert some.test_ids.tolist() == [3, 0]
    monkeypatch.setattr(stored_scores, "TILE_BYTES", 2 * 8 * N)
    tiles = list(stored.tiles())
    assert [tile.shape[0] for tile in tiles] == [2, 2, 1]
    assert torch.equal(torch.cat([tile.values for tile in tiles]), whole.values)


def test_what_scores_save_wrote_is_read_too(influence, tests, tmp_path):
    expected = influence.score(tests)
    stored = rf.StoredScores(expected.save(tmp_path / "scores"))
    pd.testing.assert_frame_equal(stored.top(4), expected.top(4))
    assert torch.equal(stored.load().values, expected.values)
    assert str(K) in repr(stored)


def test_accuracy_is_reached_for_the_tests_of_every_tile(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "tile_size", lambda tests, n: 2)
    influence = rf.Influence(
        rf.Task(Counting()),
        solver=rf.solvers.Sketched(rf.sketches.SJLT(32)),
        damping=1.0,
        accuracy=rf.Accuracy(0.2),
        progress=False,
    ).fit(TRAIN)
    stored = influence.score(TEST, out=tmp_path / "scores")
    expected = influence.score(TEST)
    torch.testing.assert_close(stored.load().values, expected.values, rtol=1e-4, atol=1e-6)


def test_a_tile_is_as_large_as_the_memory_and_of_whole_batches():
    influence = fitted(TRAIN)
    rows = influence._test_rows(TEST)
    for memory, expected in ((0, 1), (3 * 8 * 8 * N, 3), (9 * 8 * 8 * N, 8)):
        rows.memory = memory
        assert scoring.tile_size(rows, N) == expected


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    influence = fitted(TRAIN)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(DataError, match="exists and holds no scores: choose another path"):
        influence.score(TEST, out=tmp_path)
    assert (tmp_path / "notes").read_text() == "mine"
    with pytest.raises(RefluenceError, match="score without `out`"):
        influence.score(TEST, out=tmp_path / "scores", by_block=True)
    with pytest.raises(DataError, match="holds no scores"):
        rf.StoredScores(tmp_path)


def test_a_failure_leaves_the_old_scores(tmp_path, monkeypatch):
    influence = fitted(TRAIN)
    influence.score(TEST, out=tmp_path / "scores")
    before = json.loads((tmp_path / "scores" / "manifest.json").read_text())
    monkeypatch.setattr(stored_scores, "KEPT", 0)
    with pytest.raises(DataError, match="k must be"):
        influence.score(data(3, seed=5), out=tmp_path / "scores")
    assert json.loads((tmp_path / "scores" / "manifest.json").read_text()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]
