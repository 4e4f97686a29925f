from __future__ import annotations

import numpy as np
import pytest
import torch

import refluence as rf
from refluence.errors import DataError
from refluence.evaluation.agreement import loo_agreement
from refluence.evaluation.comparison import evaluate
from refluence.evaluation.lds import lds
from refluence.evaluation.mislabel import mislabel
from refluence.evaluation.retrieval import class_retrieval
from refluence.evaluation.tail_patch import tail_patch
from support.digits_regression import DigitsRegression, halves

COLUMNS = ["method", "kind", "metric", "value", "low", "high", "confidence"]
BASELINES = ["random", "loss", "gradient dot", "gradient cosine", "embedding cosine"]


@pytest.fixture(scope="module")
def problem():
    return DigitsRegression(n=90, k=12)


@pytest.fixture(scope="module")
def truth(problem):
    return problem.retrain(halves(problem.n, 15))


def test_one_line_compares_with_every_baseline(problem, truth):
    influence = problem.influence()
    labels = (problem.train[1], problem.test[1])
    wrong = torch.arange(0, 90, 9)
    scores = influence.score(problem.test)
    table = evaluate(
        {"exact": influence, "damped": influence.at(1.0).score(problem.test)},
        truth,
        test=problem.test,
        train=problem.train,
        wrong=wrong,
        labels=labels,
        k=3,
        metrics={"patch": lambda s: tail_patch(influence.task, s, problem.train, problem.test, k=2, progress=False)},
        resamples=50,
        progress=False,
    )
    assert table.columns.tolist() == COLUMNS
    found = table.set_index(["method", "metric"])
    expected = lds(scores, truth, resamples=50)
    row = found.loc[("exact", "lds")]
    assert (row["value"], row["low"], row["high"]) == (expected.value, expected.low, expected.high)
    assert found.loc[("exact", "class_retrieval"), "value"] == float(class_retrieval(scores, *labels))
    detected = mislabel(influence.self_influence(), wrong, resamples=50)
    assert found.loc[("exact", "auroc"), "value"] == float(detected.auroc)
    assert ("damped", "auroc") not in found.index  # scores of test rows say nothing of wrong labels
    assert {name for name, kind in zip(table["method"], table["kind"], strict=True) if kind == "baseline"} == set(
        BASELINES
    )
    assert set(found.loc["gradient dot"].index) >= {"lds", "auroc", "patch", "top_cardinality"}
    order = table[table["metric"] == "lds"].set_index("method")["value"]
    assert order["exact"] > order["gradient dot"] > order["random"]


def test_leaving_few_out_is_compared_as_changes(problem):
    masks = torch.ones(8, 90, dtype=torch.bool)
    masks[range(8), range(0, 80, 10)] = False
    truth = problem.retrain(masks)
    scores = problem.influence().score(problem.test)
    table = evaluate({"exact": scores}, truth, baselines=False, resamples=20)
    frame = loo_agreement(scores, truth, resamples=20)
    pooled = frame[frame["scope"] == "pooled"]
    assert table["metric"].tolist() == [*("loo_" + pooled["metric"]), "top_cardinality"]
    np.testing.assert_array_equal(table["low"][:-1], pooled["low"])


def test_scores_alone_meet_random_ones(problem, truth):
    table = evaluate({"x": torch.randn(12, 90)}, truth, resamples=20)
    assert table.groupby("kind")["method"].unique().map(list).to_dict() == {"baseline": ["random"], "method": ["x"]}
    own = evaluate({"random": torch.randn(12, 90)}, truth, resamples=20)
    assert set(own["kind"]) == {"method"}


def test_anything_with_a_score_is_a_method(problem, truth):
    class Constant:
        def score(self, test):
            return rf.Scores(torch.arange(90.0).repeat(len(test[0]), 1), 90)

    table = evaluate({"constant": Constant()}, truth, test=problem.test, baselines=False, resamples=20)
    assert table["metric"].tolist() == ["lds", "top_cardinality"]


def test_wrong_input_is_named(problem, truth):
    with pytest.raises(DataError, match="no method"):
        evaluate({}, truth)
    with pytest.raises(DataError, match="give test="):
        evaluate({"exact": problem.influence()}, truth)
    with pytest.raises(DataError, match="method 'x' is a list"):
        evaluate({"x": [1, 2]}, truth)


def test_a_method_named_as_a_baseline_keeps_its_own_numbers(problem):
    influence = problem.influence()
    wrong = torch.arange(0, 90, 9)
    table = evaluate(
        {"loss": influence, "random": influence.score(problem.test)},
        test=problem.test,
        train=problem.train,
        wrong=wrong,
        resamples=20,
        progress=False,
    ).set_index(["method", "metric"])
    assert table.loc[("loss", "auroc"), "value"] == float(mislabel(influence.self_influence(), wrong).auroc)
    assert ("random", "auroc") not in table.index
