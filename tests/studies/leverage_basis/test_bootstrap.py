"""Intervals over seeds, and the artefact of unpivoted QR, on cases that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from refluence.studies.leverage_basis.agreement import MEASURES, group_means, matrix_of
from refluence.studies.leverage_basis.artefact import artefact, unpivoted_leverage
from refluence.studies.leverage_basis.bases import Basis

BASES = (
    Basis("raw", "raw", 0, "raw"),
    *(Basis(f"{group}_{seed}", group, seed, f"{group}{seed}") for group in ("a", "b") for seed in (1, 2, 3)),
)


def means_of(function):
    pairs = [(x, y) for i, x in enumerate(BASES) for y in BASES[i + 1 :]]
    values = torch.tensor([function(x, y) for x, y in pairs], dtype=torch.float64)
    frame = group_means("plain", dict.fromkeys(MEASURES, values), BASES)
    return frame[frame["measure"] == "tau"].set_index(["group_a", "group_b", "seeds"])


def test_means_are_over_the_pairs_of_two_groups():
    table = means_of(lambda x, y: 10 * x.seed + y.seed + (100 if x.group != y.group else 0))
    assert table.loc[("a", "a", "different"), "mean"] == pytest.approx(np.mean([12, 13, 23]))
    assert table.loc[("a", "b", "same"), "mean"] == pytest.approx(100 + np.mean([11, 22, 33]))
    different = [10 * s + t for s in (1, 2, 3) for t in (1, 2, 3) if s != t]
    assert table.loc[("a", "b", "different"), "mean"] == pytest.approx(100 + np.mean(different))
    assert table.loc[("raw", "a", "different"), "pairs"] == 3
    assert ("raw", "raw", "different") not in table.index


def test_an_interval_is_as_wide_as_seeds_make_it_not_pairs():
    """Pairs that depend on one seed of the two: the interval is that of few seeds, and of constants a point."""
    constant = means_of(lambda x, y: 0.5)
    row = constant.loc[("a", "a", "different")]
    assert row["low"] == row["high"] == pytest.approx(0.5)
    varied = means_of(lambda x, y: float(1 in (x.seed, y.seed)))
    row = varied.loc[("a", "a", "different")]
    assert (row["low"], row["high"]) == (pytest.approx(0.0), pytest.approx(1.0))


def test_without_seeds_there_is_no_interval():
    bases = (Basis("raw", "raw", 0, "raw"), Basis("relu", "relu", 0, "relu"), *BASES[1:3])
    values = torch.arange(6, dtype=torch.float64)
    frame = group_means("ridge", dict.fromkeys(MEASURES, values), bases)
    row = frame[(frame["group_a"] == "raw") & (frame["group_b"] == "relu")].iloc[0]
    assert row["mean"] == 0
    assert math.isnan(row["low"])


def test_a_matrix_holds_its_pairs_twice():
    matrix = matrix_of(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), 3)
    torch.testing.assert_close(matrix, matrix.T)
    assert matrix[0, 2] == pytest.approx(0.2)
    assert matrix.diagonal().tolist() == [1, 1, 1]


def test_a_zero_column_gives_unpivoted_qr_a_row_of_leverage_one():
    X = torch.randn(3_000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    X[:, 2] = 0
    right = (X @ torch.linalg.pinv(X)).diagonal()
    tensors, facts = artefact(X, right)
    assert facts["sum_right"] == pytest.approx(5)
    assert facts["sum_wrong"] == pytest.approx(6, abs=1e-4)
    assert (facts["near_one_right"], facts["spurious"]) == (0, 1)
    assert int((tensors["wrong"] - right).abs().argmax()) == facts["highest_row"]
    moved = unpivoted_leverage(X.flip(0)).flip(0)
    assert float((moved - tensors["wrong"]).abs().max()) > 0.5  # it depends on the order of the rows
