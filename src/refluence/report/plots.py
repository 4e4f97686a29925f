"""Matplotlib pictures for notebooks: each draws into the axes given, or new ones, and returns them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from refluence.scores import Scores

HELPFUL = "#0a5c9e"
HARMFUL = "#c8640f"
INK = "#3a3f45"


def plot_top(scores: Scores, test: int = 0, k: int = 8, ax: Axes | None = None) -> Axes:
    """Bars of the `k` most helpful and `k` most harmful training examples of one test example.

    `test` counts the rows of the scores. The bars are the predicted change if the example were removed, with 95 %
    intervals where the scores have errors.
    """
    changes = _array(scores.predicted_loo_change)[test]
    order = np.argsort(-changes, kind="stable")
    chosen = np.unique(np.concatenate([order[:k], order[::-1][:k]]))
    chosen = chosen[np.argsort(changes[chosen], kind="stable")]
    errors = None if scores.error is None else 1.96 * _array(scores.error)[test][chosen] / scores.n_train
    ax = ax or _axes(height=0.6 + 0.24 * len(chosen))
    colors = [HELPFUL if change > 0 else HARMFUL for change in changes[chosen]]
    ax.barh(range(len(chosen)), changes[chosen], xerr=errors, color=colors, ecolor=INK, height=0.7)
    ax.set_yticks(range(len(chosen)), [str(scores.train_ids[j]) for j in chosen])
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.set(xlabel="predicted change if removed", ylabel="training row", title=f"Test row {scores.test_ids[test]}")
    return _quiet(ax)


def plot_scores(scores: Scores, test: int = 0, ax: Axes | None = None) -> Axes:
    """All scores of one test example, sorted: helpful on the left, harmful on the right."""
    values = np.sort(_array(scores.values)[test])[::-1]
    ranks = np.arange(1, len(values) + 1)
    ax = ax or _axes()
    ax.fill_between(ranks, values, where=values >= 0, color=HELPFUL, alpha=0.6, linewidth=0, label="helpful")
    ax.fill_between(ranks, values, where=values <= 0, color=HARMFUL, alpha=0.6, linewidth=0, label="harmful")
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.set(xlabel="training examples, sorted", ylabel="score", title=f"Test row {scores.test_ids[test]}")
    ax.legend(frameon=False)
    return _quiet(ax)


def plot_share(scores: Scores, tests: Sequence[int] | None = None, ax: Axes | None = None) -> Axes:
    """The share of the total |influence| that the strongest training examples hold, one curve for each test example.

    `tests` are rows of the scores, default all; the dotted line is an influence spread evenly.
    """
    values = np.abs(_array(scores.values))
    chosen = np.arange(len(values)) if tests is None else np.asarray(tests)
    strength = np.sort(values[chosen], axis=1)[:, ::-1]
    total = strength.sum(axis=1, keepdims=True)
    shares = np.cumsum(strength, axis=1) / np.where(total > 0, total, 1)
    ranks = np.arange(1, strength.shape[1] + 1)
    ax = ax or _axes()
    ax.plot(ranks, shares.T, color=HELPFUL, linewidth=1.2, alpha=max(0.15, 1 / max(len(chosen), 1) ** 0.5))
    ax.plot(ranks, ranks / len(ranks), color=INK, linewidth=1, linestyle=":", label="spread evenly")
    ax.set(xscale="log", ylim=(0, 1.02), xlabel="strongest training examples", ylabel="share of the total influence")
    ax.legend(frameon=False)
    return _quiet(ax)


def plot_self_influence(
    self_influence: Tensor | ArrayLike, marked: ArrayLike | None = None, ax: Axes | None = None
) -> Axes:
    """Self-influence of the training examples, sorted; `marked` rows (say, known wrong labels) as ticks above."""
    values = _array(self_influence)
    order = np.argsort(-values, kind="stable")
    ranks = np.arange(1, len(values) + 1)
    ax = ax or _axes()
    ax.plot(ranks, values[order], color=INK, linewidth=1.5)
    ax.axhline(float(values.mean()), color=INK, linewidth=0.8, linestyle=":", label=f"mean {values.mean():.3g}")
    if marked is not None:
        places = np.flatnonzero(np.isin(order, np.asarray(marked)))
        height = np.full(len(places), float(values.max()) * 1.04)
        ax.plot(places + 1, height, "|", color=HARMFUL, markersize=9, label=f"marked ({len(places)})")
    ax.set(xlabel="training examples, sorted", ylabel="self-influence")
    ax.legend(frameon=False)
    return _quiet(ax)


def _array(values: Any) -> NDArray[np.float64]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
    return np.asarray(values, dtype=np.float64)


def _axes(height: float = 3.4) -> Axes:
    return plt.subplots(figsize=(6.4, height), layout="constrained")[1]


def _quiet(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    return ax
