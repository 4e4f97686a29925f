from __future__ import annotations

import numpy as np
import pytest
import torch

from refluence.errors import DataError
from refluence.evaluation import GroundTruth
from refluence.evaluation.removal import brittleness, removal_curve
from support.digits_regression import DigitsRegression


class Additive:
    """A world in which removing example j adds effect_ij to the loss of test i, plus noise by seed."""

    def __init__(self, effects, seeds=1, noise=0.0):
        self.effects, self.seeds, self.noise = effects.double(), seeds, noise
        self.calls: list[int] = []

    def __call__(self, masks):
        self.calls.append(len(masks))
        removed = (~masks).double() @ self.effects.T
        generator = torch.Generator().manual_seed(len(self.calls))
        noise = self.noise * torch.randn(len(masks), self.seeds, 1, dtype=torch.float64, generator=generator)
        loss = removed[:, None] + noise
        return GroundTruth(masks, {"loss": loss, "error": (loss > 1).double()})


@pytest.fixture
def effects():
    return torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_summed_scores_remove_the_same_for_all(effects):
    world = Additive(effects)
    frame = removal_curve({"true": effects, "wrong": -effects}, world, [3, 1], random=4)
    summed = effects.sum(dim=0).sort(descending=True).values / 5
    found = frame.set_index(["method", "end", "removed"])["change"]
    for size in (1, 3):
        assert found["true", "helpful", size] == pytest.approx(float(summed[:size].sum()))
        assert found["true", "harmful", size] == pytest.approx(float(summed[-size:].sum()))
        assert found["wrong", "helpful", size] == found["true", "harmful", size]
    removal_curve({"true": effects, "wrong": -effects}, world, [3, 1], random=0)
    assert world.calls[-1] == 1 + 4  # equal removals are trained once
    assert bool(((frame["low"] <= frame["change"]) & (frame["change"] <= frame["high"])).all())


def test_each_test_by_its_own_scores(effects):
    frame = removal_curve(effects, Additive(effects), [2], tests="each", random=0)
    found = frame.set_index("end")["change"]
    ordered = effects.sort(dim=1, descending=True).values
    assert found["helpful"] == pytest.approx(float(ordered[:, :2].sum(dim=1).mean()))
    assert found["harmful"] == pytest.approx(float(ordered[:, -2:].sum(dim=1).mean()))
    assert set(frame["method"]) == {"scores"}


def test_the_interval_holds_the_noise_of_training():
    """No effect, equal tests, seed noise of sd 1: the standard error of a difference of means of 50 is 0.2."""
    world = Additive(torch.zeros(3, 20), seeds=50, noise=1.0)
    frame = removal_curve(torch.randn(3, 20), world, [5], random=0)
    width = (frame["high"] - frame["low"]) / (2 * 1.96)
    np.testing.assert_allclose(width, 0.2, rtol=0.25)
    one = removal_curve(torch.randn(3, 20), Additive(torch.zeros(3, 20)), [5], random=0)
    assert bool((one["high"] == one["low"]).all())


@pytest.mark.parametrize("threshold", [1.0, 4.0])
def test_brittleness_is_the_fewest_removals_of_a_linear_search(effects, threshold):
    world = Additive(effects)
    sizes = [1, 2, 3, 5, 8, 13]
    found = brittleness({"true": effects}, world, sizes, measurement="loss", threshold=threshold, random=False)
    ordered = effects.clamp(min=0).sort(dim=1, descending=True).values.cumsum(dim=1)
    for i, row in found.examples.iterrows():
        enough = [size for size in sizes if ordered[i, size - 1] > threshold]
        assert row["removed"] == (enough[0] if enough else pytest.approx(np.nan, nan_ok=True))
    assert len(world.calls) <= 5
    shares = [(found.examples["removed"] <= size).mean() for size in sizes]
    np.testing.assert_allclose(found.curve["flipped"], shares)


def test_tests_that_are_wrong_already_are_left_out(effects):
    class Wrong(Additive):
        def __call__(self, masks):
            truth = super().__call__(masks)
            truth.measurements["error"][:, :, 3] = 1
            return truth

    with pytest.warns(UserWarning, match="1 of 3 test examples"):
        found = brittleness(effects, Wrong(effects), [1, 4], tests=[1, 3, 4])
    assert sorted(found.examples["test"].unique()) == [1, 4]
    assert set(found.examples["method"]) == {"scores", "random"}
    with pytest.raises(DataError, match="none of the 1 test examples"):
        brittleness(effects, Wrong(effects), [1, 4], tests=[3])


def test_digits_are_flipped_by_their_helpful_examples():
    problem = DigitsRegression(n=80, k=12)
    scores = problem.influence().score(problem.test)
    curve = removal_curve(scores, problem.retrain, [4], tests="each", random=2).set_index("end")
    assert curve.loc["helpful", "low"] > curve.loc["random", "high"]
    assert curve.loc["harmful", "high"] < curve.loc["random", "low"]
    right = (problem.baseline()["error"][0] == 0).nonzero()[:, 0].tolist()
    flipped = brittleness(scores, problem.retrain, [2, 8], tests=right[:6]).curve.set_index(["method", "removed"])
    assert flipped.loc[("scores", 8), "flipped"] > flipped.loc[("random", 8), "flipped"]


def test_ties_are_removed_in_a_seeded_random_order():
    effects = torch.zeros(2, 60, dtype=torch.float64)
    effects[:, :6] = 1  # what an order by index would remove
    found = [
        removal_curve(torch.zeros(2, 60), Additive(effects), [6], random=0, seed=seed)["change"][0]
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1]
    assert max(found) < 4


def test_wrong_input_is_named(effects):
    world = Additive(effects)
    with pytest.raises(DataError, match=r"from 1 to 39, not \[40\]"):
        removal_curve(effects, world, [40])
    with pytest.raises(DataError, match="different shapes"):
        removal_curve({"a": effects, "b": effects[:2]}, world, [1])
    with pytest.raises(DataError, match="'margin'"):
        removal_curve(effects, world, [1], measurement="margin")
    with pytest.raises(DataError, match="measure the 4 test rows"):
        removal_curve(effects[:4], world, [1])
    with pytest.raises(DataError, match="tests must be"):
        removal_curve(effects, world, [1], tests="mean")
    with pytest.raises(DataError, match="'scores' hold NaN"):
        removal_curve(torch.where(effects > 2, torch.nan, effects), Additive(effects), [1])
