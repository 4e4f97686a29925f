from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import refluence as rf
from refluence.errors import DataError
from refluence.evaluation import GroundTruth
from refluence.evaluation.agreement import METRICS, agreement, loo_agreement, predicted_changes
from support.digits_regression import DigitsRegression


def row(frame, metric):
    return frame.set_index("metric").loc[metric]


def reference(p, a):
    """Every metric from its definition, by numpy and scipy."""
    signs = [stats.pearsonr(p[s], a[s]).statistic for s in (p > 0, p < 0) if s.sum() >= 3]
    return {
        "pearson": stats.pearsonr(p, a).statistic,
        "spearman": stats.spearmanr(p, a).statistic,
        "slope": np.polyfit(a, p, 1)[0],
        "r2": 1 - ((a - p) ** 2).sum() / ((a - a.mean()) ** 2).sum(),
        "within_sign": np.mean(signs),
        "rmse_over_sd": np.sqrt(((p - a) ** 2).mean()) / a.std(),
    }


@pytest.fixture
def pairs():
    generator = np.random.default_rng(0)
    a = generator.standard_normal((4, 30)).round(1)
    return 0.7 * a + 0.2 * generator.standard_normal((4, 30)) + 0.1, a


def test_every_metric_is_its_definition(pairs):
    p, a = pairs
    frame = agreement(p, a)
    assert frame["metric"].tolist() == list(METRICS)
    for metric, expected in reference(p.ravel(), a.ravel()).items():
        found = row(frame, metric)
        assert found["value"] == pytest.approx(expected, abs=1e-12)
        assert found["low"] < found["value"] < found["high"]
        assert found["n"] == 120


def test_intervals_of_one_test_are_those_of_resampled_pairs():
    """Against a plain loop over resamples of the pairs."""
    generator = np.random.default_rng(1)
    a = generator.standard_normal(80)
    p = 0.5 * a + 0.3 * generator.standard_normal(80)
    frame = agreement(p, a, resamples=3000)
    draws = [reference(p[i], a[i]) for i in (generator.integers(0, 80, 80) for _ in range(800))]
    for metric in ("slope", "r2", "rmse_over_sd", "pearson"):
        low, high = np.quantile([draw[metric] for draw in draws], [0.025, 0.975])
        width = high - low
        found = row(frame, metric)
        assert found["low"] == pytest.approx(low, abs=0.15 * width)
        assert found["high"] == pytest.approx(high, abs=0.15 * width)


def test_perfect_predictions():
    a = np.random.default_rng(0).standard_normal(20)
    frame = agreement(a, a)
    for metric in ("pearson", "spearman", "slope", "r2", "within_sign"):
        assert row(frame, metric)["value"] == pytest.approx(1)
    assert row(frame, "rmse_over_sd")["value"] == pytest.approx(0)


def test_a_scale_lowers_slope_and_r2_only():
    a = np.random.default_rng(0).standard_normal(200)
    frame = agreement(0.65 * a, a)
    assert row(frame, "slope")["value"] == pytest.approx(0.65)
    assert row(frame, "r2")["value"] == pytest.approx(1 - 0.35**2 * (1 + a.mean() ** 2 / a.var()))
    assert row(frame, "pearson")["value"] == row(frame, "spearman")["value"] == pytest.approx(1)


def test_signs_alone_do_not_pass_within_signs():
    """Two clusters and noise within: Pearson is high, the correlation within a sign is none."""
    generator = np.random.default_rng(0)
    sign = np.repeat([-1.0, 1.0], 100)
    p, a = (sign * (2 + 0.5 * generator.standard_normal(200)) for _ in range(2))
    frame = agreement(p, a)
    assert row(frame, "pearson")["value"] > 0.9
    assert row(frame, "within_sign")["low"] < 0 < row(frame, "within_sign")["high"]


def test_what_is_not_defined_is_nan():
    frame = agreement(np.full(5, 0.1), np.arange(5.0))
    assert np.isnan(row(frame, "pearson")["value"])
    assert np.isnan(row(frame, "spearman")["value"])
    assert row(frame, "slope")["value"] == pytest.approx(0, abs=1e-12)
    frame = agreement(np.arange(5.0), np.full(5, 0.1))
    assert np.isnan([row(frame, metric)["value"] for metric in METRICS]).all()
    frame = agreement(np.array([1.0, 2, 3, -1, -2]), np.array([1.0, 2.5, 3, -1, -2]))
    expected = stats.pearsonr([1, 2, 3], [1, 2.5, 3]).statistic  # two of a sign are too few
    assert row(frame, "within_sign")["value"] == pytest.approx(expected)


def test_predicted_changes_are_sums_of_what_is_left_out():
    values = torch.tensor([[3.0, -1, 2, 0]], dtype=torch.float64)
    masks = torch.tensor([[False, True, True, True], [True, False, False, True], [True, True, True, False]])
    truth = GroundTruth(masks, {"loss": torch.zeros(3, 1, 1, dtype=torch.float64)})
    assert predicted_changes(values, truth).tolist() == [[0.75, 0.25, 0.0]]


def test_leave_one_out_on_digits():
    """Exact influence of a convex model, with each example's share of the l2 term left out, against real refits."""
    problem = DigitsRegression(n=100, k=4)
    removed = list(range(0, 100, 10))
    masks = torch.ones(len(removed), 100, dtype=torch.bool)
    masks[range(len(removed)), removed] = False
    truth = problem.retrain(masks)
    scores = problem.influence().score(problem.test)
    named = rf.Scores(scores.values, 100, test_ids=np.arange(10, 14))
    frame = loo_agreement(named, truth)
    assert frame["scope"].value_counts().to_dict() == {"test": 24, "pooled": 6, "mean": 6}
    assert frame.loc[frame["scope"] == "test", "test"].unique().tolist() == list(range(10, 14))
    assert frame.loc[frame["scope"] != "test", "test"].isna().all()
    mean = row(frame[frame["scope"] == "mean"], "pearson")
    assert mean["low"] > 0.95
    predicted = scores.values[:, removed].double().numpy() / 100
    actual = truth.changes("loss").T.numpy()
    one = row(frame[frame["test"] == 12], "slope")
    assert one["value"] == pytest.approx(reference(predicted[2], actual[2])["slope"])
    assert one["n"] == len(removed)
    pooled = row(frame[frame["scope"] == "pooled"], "spearman")
    assert pooled["value"] == pytest.approx(stats.spearmanr(predicted.ravel(), actual.ravel()).statistic)
    expected = np.mean([stats.pearsonr(p, a).statistic for p, a in zip(predicted, actual, strict=True)])
    assert mean["value"] == pytest.approx(expected)


def test_wrong_input_is_named(pairs):
    p, a = pairs
    with pytest.raises(DataError, match=r"\(4, 29\), measured \(4, 30\)"):
        agreement(p[:, :29], a)
    with pytest.raises(DataError, match="2 pairs"):
        agreement(p[0, :2], a[0, :2])
    with pytest.raises(DataError, match="1 of 120 pairs"):
        agreement(np.where(np.arange(30) + np.arange(4)[:, None] * 30 == 7, np.nan, p), a)
