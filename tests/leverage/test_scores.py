"""The result: order, table, file."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import refluence as rf
from refluence.errors import DataError
from refluence.leverage import LeverageScores
from support.leverage import deficient


def test_top_and_bottom_are_sorted_and_of_equal_scores_the_first():
    scores = LeverageScores(torch.tensor([0.1, 0.9, 0.4, 0.9, 0.1]).double(), 2.4, 0.0, "exact")
    assert scores.top(3).tolist() == [1, 3, 2]
    assert scores.bottom(2).tolist() == [0, 4]
    assert scores.top(99).tolist() == [1, 3, 2, 0, 4]
    assert scores.to_frame()["rank"].tolist() == [4, 1, 3, 2, 5]
    for k in (0, -1, True):
        with pytest.raises(DataError, match="k must be an integer of at least 1"):
            scores.top(k)


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_save_and_load_give_the_same(damping, tmp_path):
    scores = rf.leverage_scores(deficient(), damping)
    path = scores.save(tmp_path / "deep" / "leverage.parquet")
    again = rf.LeverageScores.load(path)
    torch.testing.assert_close(again.values, scores.values, rtol=0, atol=0)
    assert again.facts() == scores.facts()
    assert again.gap == scores.gap
    assert pd.read_parquet(path)["row"].tolist() == list(range(200))


def test_other_files_are_refused(tmp_path):
    pd.DataFrame({"leverage": [1.0]}).to_parquet(tmp_path / "other.parquet")
    (tmp_path / "text").write_text("no")
    for name in ("other.parquet", "text", "missing"):
        with pytest.raises(DataError, match="holds no leverage scores"):
            rf.LeverageScores.load(tmp_path / name)


def test_the_representation_says_what_was_computed():
    assert "rank 8" in repr(rf.leverage_scores(deficient()))
    assert "λ = 0.01" in repr(rf.leverage_scores(deficient(), 0.01))
