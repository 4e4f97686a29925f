from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.container import ErrorbarContainer

from refluence import Scores
from refluence.report import plot_scores, plot_self_influence, plot_share, plot_top

VALUES = torch.tensor([[4.0, -2.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
SCORES = Scores(VALUES, 4, test_ids=np.array([7, 9]))


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    with matplotlib.rc_context():
        plt.switch_backend("agg")
        yield
        plt.close("all")


def test_top() -> None:
    ax = plot_top(SCORES, test=0, k=1)
    assert [bar.get_width() for bar in ax.patches] == [-0.5, 1.0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "0"]
    assert ax.get_title() == "Test row 7"


def test_top_with_errors() -> None:
    ax = plot_top(dataclasses.replace(SCORES, error=torch.ones_like(VALUES)), test=0, k=2)
    [errors] = [container for container in ax.containers if isinstance(container, ErrorbarContainer)]
    [intervals] = errors.lines[2]
    half = [(segment[1, 0] - segment[0, 0]) / 2 for segment in intervals.get_segments()]
    assert half == pytest.approx([1.96 / 4] * 4)


def test_scores_and_share() -> None:
    assert plot_scores(SCORES, 0).get_ylabel() == "score"
    ax = plot_share(SCORES)
    assert ax.lines[0].get_ydata() == pytest.approx([4 / 7.5, 6 / 7.5, 7 / 7.5, 1])
    assert ax.lines[1].get_ydata() == pytest.approx([0, 0, 0, 0])
    assert len(plot_share(SCORES, tests=[0]).lines) == 2


def test_self_influence_marks_the_given_rows() -> None:
    own = plt.figure().add_subplot()
    ax = plot_self_influence(torch.tensor([1.0, 5.0, 3.0]), marked=[1, 0], ax=own)
    assert ax is own
    assert ax.lines[0].get_ydata().tolist() == [5, 3, 1]
    assert ax.lines[-1].get_xdata().tolist() == [1, 3]
