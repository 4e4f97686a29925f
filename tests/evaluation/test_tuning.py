from __future__ import annotations

import pytest
import torch

import refluence as rf
from refluence.errors import DataError
from refluence.evaluation.lds import lds
from refluence.evaluation.tuning import tune_damping
from support.digits_regression import DigitsRegression, halves

GRID = [1e-3, 1e-1, 10.0]


@pytest.fixture(scope="module")
def problem():
    return DigitsRegression(n=90, k=20)


@pytest.fixture(scope="module")
def truth(problem):
    return problem.retrain(halves(problem.n, 12))


def test_the_choice_is_made_on_some_rows_and_reported_on_the_others(problem, truth):
    influence = problem.influence()
    tuning = tune_damping(influence, problem.test, truth, GRID, share=0.25, seed=3, progress=False)
    assert len(tuning.chosen_rows) == 5
    assert sorted(tuning.chosen_rows + tuning.reported_rows) == list(range(20))
    values = []
    for damping in GRID:
        scores = influence.at(damping).score(problem.test)
        values.append(float(lds(scores.rows(tuning.chosen_rows), truth.tests(tuning.chosen_rows))))
    assert tuning.table["lds"].tolist() == pytest.approx(values)
    assert tuning.table["damping"].tolist() == GRID
    best = GRID[max(range(3), key=values.__getitem__)]
    assert tuning.damping == tuning.influence.damping == best
    scores = influence.at(best).score(problem.test).rows(tuning.reported_rows)
    assert float(tuning.reported) == pytest.approx(float(lds(scores, truth.tests(tuning.reported_rows))))
    assert tuning.scores.test_ids.tolist() == tuning.reported_rows
    torch.testing.assert_close(tuning.scores.values, scores.values)


def test_reported_rows_have_no_part_in_the_choice(problem, truth):
    influence = problem.influence()
    first = tune_damping(influence, problem.test, truth, GRID, share=0.25, progress=False)
    spoilt = truth.measurements["loss"].clone()
    spoilt[:, :, first.reported_rows] = torch.randn(
        12, 1, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    other = tune_damping(
        influence, problem.test, type(truth)(truth.masks, {"loss": spoilt}), GRID, share=0.25, progress=False
    )
    assert other.chosen_rows == first.chosen_rows
    assert other.table.equals(first.table)
    assert other.damping == first.damping
    assert float(other.reported) < float(first.reported)


def test_rules_are_dampings_too_and_an_edge_is_said(problem, truth):
    influence = problem.influence()
    grid = [rf.EffectiveDimension(20), rf.EffectiveDimension(5)]
    tuning = tune_damping(influence, problem.test, truth, grid, share=0.5, progress=False)
    assert tuning.damping in grid
    assert tuning.table["effective_dimension"].tolist() == pytest.approx([20, 5], rel=1e-4)
    assert tuning.at_edge
    assert not tune_damping(influence, problem.test, truth, grid[:1], share=0.5, progress=False).at_edge


def test_wrong_input_is_named(problem, truth):
    influence = problem.influence()
    for share in (0.0, 0.01, 1.0):
        with pytest.raises(DataError, match="at least one row must be on each side"):
            tune_damping(influence, problem.test, truth, GRID, share=share)
    with pytest.raises(DataError, match="grid"):
        tune_damping(influence, problem.test, truth, [])
    with pytest.raises(DataError, match="20 rows and the ground truth 19"):
        tune_damping(influence, problem.test, truth.tests(range(19)), GRID)
