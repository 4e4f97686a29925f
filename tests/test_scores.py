"""Scores: order, frames, intervals, and files that survive."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import refluence as rf
from refluence.errors import DataError

VALUES = torch.tensor([[3.0, -1.0, 0.5, 2.0], [-4.0, 1.0, 0.0, -2.0]], dtype=torch.float64)


@pytest.fixture
def scores():
    return rf.Scores(VALUES, n_train=4, test_ids=np.array([10, 20]), target_damping=0.1, manifest={"seed": 3})


def test_top_lists_the_most_helpful_first(scores):
    top = scores.top(2)
    assert list(top.columns) == ["test", "rank", "train", "score", "error", "predicted_loo_change"]
    assert top["test"].tolist() == [10, 10, 20, 20]
    assert top["rank"].tolist() == [1, 2, 1, 2]
    assert top["train"].tolist() == [0, 3, 1, 2]
    assert top["score"].tolist() == [3.0, 2.0, 1.0, 0.0]
    assert top["error"].isna().all()
    assert top["predicted_loo_change"].tolist() == [0.75, 0.5, 0.25, 0.0]


def test_bottom_lists_the_most_harmful_first(scores):
    assert scores.bottom(1)["train"].tolist() == [1, 0]
    assert scores.bottom(99)["train"].tolist() == [1, 2, 3, 0, 0, 3, 2, 1]


def test_removal_changes_the_measurement_by_the_score_over_n(scores):
    torch.testing.assert_close(scores.predicted_loo_change, VALUES / 4)


def test_intervals_are_normal_and_a_point_where_exact(scores):
    lower, upper = scores.interval(0.95)
    assert torch.equal(lower, VALUES)
    assert torch.equal(upper, VALUES)
    with_error = rf.Scores(VALUES, 4, error=torch.full_like(VALUES, 2.0))
    lower, upper = with_error.interval(0.95)
    torch.testing.assert_close(upper - VALUES, torch.full_like(VALUES, 2 * 1.959963984540054))
    torch.testing.assert_close(VALUES - lower, upper - VALUES)
    with pytest.raises(DataError, match=r"1\.5"):
        scores.interval(1.5)


def test_every_pair_is_a_row_of_the_frame_and_of_the_parquet_file(scores, tmp_path):
    frame = scores.to_frame()
    assert len(frame) == 8
    assert frame.query("test == 20 and train == 3")["score"].item() == -2.0
    pd.testing.assert_frame_equal(pd.read_parquet(scores.to_parquet(tmp_path / "scores.parquet")), frame)


@pytest.mark.parametrize("ids", [np.arange(4), np.array(["a", "b", "ü", "d"])])
@pytest.mark.parametrize("error", [None, torch.ones_like(VALUES)])
def test_saved_scores_load_as_they_were(ids, error, tmp_path):
    scores = rf.Scores(VALUES, 4, ids, np.array([10, 20]), error, {"a": 0.1, "b": 0.2}, {"seed": 3})
    loaded = rf.Scores.load(scores.save(tmp_path / "scores.zarr"))
    assert torch.equal(loaded.values, VALUES)
    assert loaded.values.dtype == torch.float64
    assert loaded.train_ids.tolist() == ids.tolist()
    assert loaded.test_ids.tolist() == [10, 20]
    assert loaded.n_train == 4
    assert loaded.target_damping == {"a": 0.1, "b": 0.2}
    assert (loaded.error is None) == (error is None)
    assert loaded.manifest["seed"] == 3
    assert json.loads((tmp_path / "scores.zarr" / "manifest.json").read_text())["seed"] == 3


def test_a_folder_with_no_scores_does_not_load(tmp_path):
    with pytest.raises(DataError, match="holds no scores"):
        rf.Scores.load(tmp_path)


def test_scores_of_another_format_name_it(scores, tmp_path):
    path = scores.save(tmp_path / "scores.zarr")
    import zarr

    group = zarr.open_group(str(path), mode="a")
    group.attrs["manifest"] = {**group.attrs["manifest"], "format": "refluence-scores-99"}
    with pytest.raises(DataError, match="refluence-scores-99"):
        rf.Scores.load(path)


def test_a_manifest_that_is_not_json_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="JSON"):
        rf.Scores(VALUES, 4, manifest={"seed": object()}).save(tmp_path / "scores.zarr")
    assert list(tmp_path.iterdir()) == []


def test_rows_picks_tests_by_position(scores):
    picked = scores.rows([1])
    assert torch.equal(picked.values, VALUES[1:])
    assert picked.test_ids.tolist() == [20]


@pytest.mark.parametrize("k", [0, -1, 1.5])
def test_a_k_that_is_no_count_is_refused(scores, k):
    with pytest.raises((DataError, TypeError), match=str(k)):
        scores.top(k)


def test_ids_and_errors_must_fit_the_values():
    with pytest.raises(DataError, match="train_ids"):
        rf.Scores(VALUES, 4, np.arange(3))
    with pytest.raises((DataError, TypeError), match="error"):
        rf.Scores(VALUES, 4, error=torch.ones(2, 3, dtype=torch.float64))


# ---------------------------------------------------------------- errors

ERROR = torch.tensor([[1.0, 0.1, 0.5, 2.0], [1.0, 1.0, 0.25, 1.0]], dtype=torch.float64)
Z = 1.959963984540054


@pytest.fixture
def uncertain():
    return rf.Scores(VALUES, n_train=4, test_ids=np.array([10, 20]), error=ERROR)


def test_a_score_is_indistinguishable_where_its_interval_covers_zero(uncertain, scores):
    expected = VALUES.abs() <= Z * ERROR
    assert torch.equal(uncertain.indistinguishable(), expected)
    assert uncertain.indistinguishable().tolist() == [[False, False, True, True], [False, True, True, False]]
    low, high = uncertain.interval(0.5)
    assert torch.equal(uncertain.indistinguishable(0.5), (low <= 0) & (high >= 0))
    assert scores.indistinguishable().tolist() == [[False] * 4, [False, False, True, False]]  # exact: the zero alone
    with pytest.raises(DataError, match=r"-0\.1"):
        scores.indistinguishable(-0.1)


def test_tables_say_how_sure_every_row_is(uncertain):
    top, bottom = uncertain.top(2), uncertain.bottom(2)
    exact = ["test", "rank", "train", "score", "error", "predicted_loo_change"]
    assert list(top.columns) == [*exact, "low", "high", "distinguishable", "probability_in_top"]
    assert list(bottom.columns) == [*exact, "low", "high", "distinguishable", "probability_in_bottom"]
    assert top["train"].tolist() == [0, 3, 1, 2]
    np.testing.assert_allclose(top["low"], top["score"] - Z * top["error"])
    np.testing.assert_allclose(top["high"], top["score"] + Z * top["error"])
    assert top["distinguishable"].tolist() == [True, False, False, False]
    for frame, name, chances in (
        (top, "probability_in_top", uncertain.probability_in_top(2)),
        (bottom, "probability_in_bottom", uncertain.probability_in_bottom(2)),
    ):
        rows = [0, 0, 1, 1]
        np.testing.assert_array_equal(frame[name], chances[rows, frame["train"].to_numpy()])
    # 3 ± 1 and 2 ± 2 against 0.5 ± 0.5 and −1 ± 0.1
    assert top["probability_in_top"][0] > 0.98
    assert 0.7 < top["probability_in_top"][1] < 0.8


def test_every_pair_has_its_interval_in_the_frame_and_the_file(uncertain, tmp_path):
    frame = uncertain.to_frame()
    assert list(frame.columns)[-2:] == ["low", "high"]
    np.testing.assert_allclose((frame["high"] - frame["low"]) / 2, Z * frame["error"])
    pd.testing.assert_frame_equal(pd.read_parquet(uncertain.to_parquet(tmp_path / "scores.parquet")), frame)


def test_the_top_of_exact_scores_is_certain(scores):
    assert scores.probability_in_top(2).tolist() == [[1, 0, 0, 1], [0, 1, 1, 0]]
    assert scores.probability_in_bottom(1).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert scores.probability_in_top(99).tolist() == [[1.0] * 4] * 2
    with pytest.raises((DataError, TypeError), match="0"):
        scores.probability_in_top(0)


def test_scores_of_an_approximation_without_errors_do_not_pass_for_exact():
    values = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    scores = rf.Scores(values, 3, manifest={"exact": False})
    assert not scores.exact
    assert "no errors known" in repr(scores)
    assert all(bool(end.isnan().all()) for end in scores.interval())
    assert bool(scores.indistinguishable().all())
    assert bool(scores.probability_in_top(1).isnan().all())
    assert bool(scores.probability_in_bottom(1).isnan().all())
    assert list(scores.top(2)["train"]) == [0, 2]
    exact = rf.Scores(values, 3, manifest={"exact": True})
    assert exact.exact
    assert "exact" in repr(exact)


@pytest.mark.parametrize("rows", [[3], [0, -4]])
def test_rows_that_do_not_exist_are_named(rows):
    scores = rf.Scores(torch.zeros(3, 2), 2)
    with pytest.raises(DataError, match=rf"no test row {rows[-1]}: the scores have 3"):
        scores.rows(rows)
