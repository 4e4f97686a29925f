from __future__ import annotations

from collections.abc import Iterator

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.container import ErrorbarContainer

from refluence.errors import DataError, RefluenceError
from refluence.evaluation.mislabel import mislabel
from refluence.evaluation.plots import (
    NEUTRAL,
    plot_agreement,
    plot_brittleness,
    plot_comparison,
    plot_detection,
    plot_removal,
    plot_spectrum,
)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    with matplotlib.rc_context():
        plt.switch_backend("agg")
        yield
        plt.close("all")


def test_comparison_is_sorted_with_intervals() -> None:
    table = pd.DataFrame(
        {
            "method": ["exact", "random", "exact"],
            "kind": ["method", "baseline", "method"],
            "metric": ["lds", "lds", "auroc"],
            "value": [0.8, 0.0, 0.9],
            "low": [0.7, -0.1, 0.8],
            "high": [0.85, 0.1, 1.0],
            "confidence": 0.9,
        }
    )
    ax = plot_comparison(table)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["random", "exact"]
    assert [bar.get_width() for bar in ax.patches] == [0.0, 0.8]
    assert ax.patches[0].get_facecolor() == matplotlib.colors.to_rgba(NEUTRAL)
    [bars] = [container for container in ax.containers if isinstance(container, ErrorbarContainer)]
    [errors] = bars.lines[2]
    np.testing.assert_allclose([s[:, 0] for s in errors.get_segments()], [[-0.1, 0.1], [0.7, 0.85]])
    assert ax.get_xlabel() == "lds (90% intervals)"
    with pytest.raises(DataError, match="use one of lds, auroc"):
        plot_comparison(table, "slope")


def test_agreement_has_actual_on_the_abscissa() -> None:
    own = plt.figure().add_subplot()
    ax = plot_agreement(torch.tensor([[1.0, 2.0]]), np.array([[3.0, 4.0]]), label="exact", ax=own)
    assert ax is own
    assert ax.collections[0].get_offsets().tolist() == [[3, 1], [4, 2]]
    assert (ax.lines[0].get_xy1(), ax.lines[0].get_slope()) == ((0, 0), 1)
    plot_agreement(torch.tensor([1.0]), [2.0], ax=ax)
    assert len({tuple(points.get_facecolor()[0]) for points in ax.collections}) == 2


def test_detection_shows_best_and_chance() -> None:
    found = mislabel(torch.tensor([3.0, 2.0, 1.0, 0.0]), [1], resamples=5)
    ax = plot_detection({"a": found, "b": found})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        f"a (area {found.area.value:.3f})",
        f"b (area {found.area.value:.3f})",
        "best possible",
        "chance",
    ]
    assert ax.lines[0].get_ydata().tolist() == found.curve["found"].tolist()
    assert len(plot_detection(found).lines) == 3


def test_removal_and_brittleness_curves() -> None:
    curve = pd.DataFrame(
        {
            "method": ["m", "m", "random"],
            "end": ["helpful", "harmful", "random"],
            "removed": [5, 5, 5],
            "change": [0.3, -0.2, 0.0],
            "low": [0.1, -0.3, -0.1],
            "high": [0.4, -0.1, 0.1],
        }
    )
    ax = plot_removal(curve)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["m, helpful", "m, harmful", "random"]
    assert [line.get_linestyle() for line in ax.lines[:3]] == ["-", "--", "-"]
    assert ax.lines[2].get_color() == NEUTRAL
    flips = pd.DataFrame({"method": ["m", "m", "random"], "removed": [1, 2, 1], "flipped": [0.2, 0.5, 0.0]})
    ax = plot_brittleness(flips.assign(low=0.0, high=1.0))
    assert ax.lines[0].get_ydata().tolist() == [0.2, 0.5]


def test_a_spectrum_falls_on_a_logarithmic_scale_with_its_damping_and_dimension() -> None:
    ax = plot_spectrum(torch.tensor([0.1, 10.0, 0.0, 1.0, 1e-18]), damping=0.1)
    spectrum, damping, dimension = ax.lines
    assert ax.get_yscale() == "log"
    np.testing.assert_allclose(spectrum.get_ydata(), [10.0, 1.0, 0.1])
    assert spectrum.get_xdata().tolist() == [1, 2, 3]
    assert damping.get_ydata() == [0.1, 0.1]
    expected = 10 / 10.1 + 1 / 1.1 + 0.5
    np.testing.assert_allclose(dimension.get_xdata(), expected, rtol=1e-6)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["λ = 0.1", f"d_λ = {expected:.1f}"]
    plot_spectrum([3.0, 2.0], ax=ax)
    assert ax.lines[3].get_color() != spectrum.get_color()
    assert len(plot_spectrum([3.0, 2.0]).lines) == 1


@pytest.mark.parametrize(("values", "damping"), [([0.0, 0.0], None), ([1.0], 0.0)])
def test_a_spectrum_without_a_positive_eigenvalue_or_damping_has_no_picture(values, damping) -> None:
    with pytest.raises(RefluenceError, match="positive eigenvalue and damping"):
        plot_spectrum(values, damping)
