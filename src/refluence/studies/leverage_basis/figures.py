"""The pictures of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from refluence.evaluation.rankings import ordering, overlap_by_chance
from refluence.studies.leverage_basis.agreement import grid_of, matrix_of
from refluence.studies.leverage_basis.arms import Arm
from refluence.studies.leverage_basis.bases import NETWORKS, RAW, RELU, Basis
from refluence.studies.leverage_basis.heads import MODEL as HEAD
from refluence.studies.leverage_basis.images import Images
from refluence.studies.leverage_basis.networks import CLASSES
from refluence.studies.leverage_basis.trainings import CONVOLUTIONAL, NETWORK

INK, BAND = "#3a3f45", "#c9ccd1"
PICTURE = (10, 30)
Panel = tuple[str, str, str, list[str]]
"""Title, model, group of the basis, arms."""
COLORS = ("#0a5c9e", "#c8640f", "#2e7d32", "#8e24aa", "#00838f", "#6d4c41", "#c62828", "#546e7a", "#9e9d24", "#ad1457")


def accuracy_figure(table: pd.DataFrame, arms: Sequence[Arm]) -> Figure:
    """Test accuracy against k: the small network and the linear head of every basis side by side, then the others."""
    titles = {arm.name: arm.title for arm in arms}
    others = [arm.name for arm in arms if not arm.kind and arm.name != "random"]
    panels: list[Panel] = []
    for source in (RAW, *NETWORKS):
        names = [arm.name for arm in arms if arm.source == source and arm.kind]
        panels += [
            (f"network, rows by {source}", NETWORK, "", names),
            (f"linear head on {source}", HEAD, source, names),
        ]
    panels += [
        ("network, other choices", NETWORK, "", others),
        ("linear head on raw, other choices", HEAD, RAW, others),
    ]
    relu = next(arm for arm in arms if arm.source.startswith(RELU))
    panels.append((f"linear head on {relu.source.replace('_', ' ')}", HEAD, relu.source, [relu.name]))
    if bool((table["model"] == CONVOLUTIONAL).any()):
        panels.append(("convolutional network", CONVOLUTIONAL, "", list(titles)))
    rows = -(-len(panels) // 2)
    figure = _figure(13.5, 4.0 * rows)
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    for ax, (title, model, group, names) in zip(axes, panels, strict=False):
        own = table[(table["model"] == model) & (table["group"] == group)]
        _accuracy_panel(ax, own, list(dict.fromkeys(["random", *names])), titles)
        ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return figure


def _accuracy_panel(ax: Axes, table: pd.DataFrame, names: Sequence[str], titles: Mapping[str, str]) -> None:
    for place, name in enumerate(name for name in names if name in set(table["arm"])):
        own = table[table["arm"] == name].sort_values("k")
        color = INK if name == "random" else COLORS[(place - 1) % len(COLORS)]
        width = 2.2 if name == "random" else 1.3
        ax.plot(own["k"], own["mean"], color=color, linewidth=width, marker=".", label=titles[name])
        ax.fill_between(own["k"], own["low"], own["high"], color=color, alpha=0.15, linewidth=0)
    ax.set(xscale="log", xlabel="selected rows, k", ylabel="test accuracy")
    ax.set_ylim(np.floor(10 * min(0.9, table["mean"].min())) / 10 if len(table) else 0, 1)
    ax.legend(frameon=False, fontsize=7.5, loc="best")
    _quiet(ax)


def heatmap_figure(agreement: Mapping[str, Mapping[str, Tensor]], bases: Sequence[Basis], top: int) -> Figure:
    """Kendall's τ and κ of the overlap at the top, for every pair of bases, by plain and by ridge leverage."""
    figure = _figure(13.5, 12.5)
    axes = figure.subplots(2, 2)
    labels = [basis.label for basis in bases]
    for row, (kind, tensors) in zip(axes, agreement.items(), strict=True):
        for ax, (measure, title) in zip(
            row, (("tau", "Kendall's τ"), ("kappa", f"κ of the {top} highest")), strict=True
        ):
            matrix = matrix_of(tensors[measure], len(bases)).numpy()
            shown = ax.imshow(matrix, vmin=min(0.0, float(matrix.min())), vmax=1, cmap="viridis")
            for (i, j), item in np.ndenumerate(matrix):
                if i != j:
                    color = "white" if item < 0.6 else "black"
                    ax.text(j, i, f"{item:.2f}".replace("0.", "."), ha="center", va="center", fontsize=6, color=color)
            ax.set_xticks(range(len(bases)), labels, rotation=90, fontsize=8)
            ax.set_yticks(range(len(bases)), labels, fontsize=8)
            ax.set_title(f"{title}, {kind} leverage", loc="left", fontsize=11, fontweight="bold")
            figure.colorbar(shown, ax=ax, shrink=0.75)
    return figure


def overlap_figure(agreement: Mapping[str, Mapping[str, Tensor]], bases: Sequence[Basis], n: int) -> Figure:
    """The share of common images among the k highest, mean over the pairs of two groups, with the band of chance."""
    grid = torch.tensor(grid_of(n))
    mean, low, high = (each.numpy() for each in overlap_by_chance(grid, n))
    k = grid.numpy()
    pairs = [(a, b) for i, a in enumerate(bases) for b in bases[i + 1 :]]
    wanted = [(g, g) for g in NETWORKS] + [(g, h) for i, g in enumerate(NETWORKS) for h in NETWORKS[i + 1 :]]
    wanted += [(RAW, g) for g in NETWORKS]
    figure = _figure(14, 5)
    for ax, (kind, tensors) in zip(figure.subplots(1, 2, sharey=True), agreement.items(), strict=True):
        ax.fill_between(k, low / k, high / k, color=BAND, label="chance, 0.1 to 99.9 %", linewidth=0)
        ax.plot(k, mean / k, color=INK, linewidth=0.8, linestyle=":", label="chance, mean k/n")
        for place, groups in enumerate(wanted):
            chosen = [i for i, (a, b) in enumerate(pairs) if (a.group, b.group) == groups and a.seed != b.seed]
            share = tensors["overlaps"][chosen].double().mean(dim=0).numpy() / k
            style = "-" if groups[0] == groups[1] else "--" if RAW not in groups else ":"
            ax.plot(k, share, color=COLORS[place % len(COLORS)], linestyle=style, label="–".join(groups))
        ax.set(xscale="log", xlabel="k highest leverages", title=f"{kind} leverage", ylim=(0, 1))
        _quiet(ax)
    figure.axes[0].set_ylabel("share in common")
    figure.axes[0].legend(frameon=False, fontsize=7.5, loc="upper left")
    return figure


def curve_figure(scores: Mapping[str, Mapping[str, Tensor]], bases: Sequence[Basis]) -> Figure:
    """Sorted leverages of every basis, on log scales."""
    groups = list(dict.fromkeys(basis.group for basis in bases))
    figure = _figure(12, 4.6)
    for ax, (kind, own) in zip(figure.subplots(1, 2, sharey=True), scores.items(), strict=True):
        for basis in bases:
            values = own[basis.name].sort(descending=True).values.numpy()
            first = basis.seed in (0, 1)
            ax.plot(
                np.arange(1, len(values) + 1),
                np.maximum(values, 1e-9),
                color=COLORS[groups.index(basis.group)],
                linewidth=1,
                label=basis.group.replace("_", " ") if first else None,
            )
        floor = min(float(each.clamp(min=1e-7).min()) for each in own.values())
        ax.set(xscale="log", yscale="log", xlabel="rank", title=f"{kind} leverage", ylim=(floor, 1.5))
        _quiet(ax)
    figure.axes[0].set_ylabel("leverage")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def digits_figure(images: Images, scores: Mapping[str, Tensor], shown: Sequence[Basis]) -> Figure:
    """The images of highest and of lowest leverage, 10 rows of 30, for some bases."""
    figure = _figure(13, 2.35 * len(shown))
    axes = figure.subplots(len(shown), 2, squeeze=False)
    for row, basis in zip(axes, shown, strict=True):
        order = ordering(scores[basis.name])
        _mosaic(row[0], images, order, f"{basis.label}: highest")
        _mosaic(row[1], images, order.flip(0), f"{basis.label}: lowest")
    return figure


def artefact_figure(images: Images, wrong: Float64[Tensor, " n"], right: Float64[Tensor, " n"]) -> Figure:
    """The images of highest leverage by unpivoted QR in float32 and by the right one, and both curves."""
    figure = _figure(13, 5.2)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.25, 1))
    _mosaic(figure.add_subplot(grid[0, 0]), images, ordering(wrong), "unpivoted QR, float32: highest")
    _mosaic(figure.add_subplot(grid[0, 1]), images, ordering(right), "rank-revealing, float64: highest")
    ax = figure.add_subplot(grid[1, :])
    places = np.arange(1, len(wrong) + 1)
    for values, label, color in ((wrong, "unpivoted QR, float32", COLORS[1]), (right, "right", COLORS[0])):
        ax.plot(places, values.sort(descending=True).values.clamp(min=1e-9).numpy(), label=label, color=color)
    ax.set(xscale="log", yscale="log", xlabel="rank", ylabel="leverage")
    ax.legend(frameon=False)
    _quiet(ax)
    return figure


def label_figure(scores: Mapping[str, Tensor], labels: Tensor, bases: Sequence[Basis], top: int, kind: str) -> Figure:
    """Labels of the k highest leverages, for every group of bases; dots are single seeds."""
    groups = list(dict.fromkeys(basis.group for basis in bases))
    figure = _figure(13, 5.4)
    base = torch.bincount(labels, minlength=CLASSES).double() / len(labels)
    for ax, group in zip(figure.subplots(2, 3, sharey=True).ravel(), groups, strict=False):
        own = [basis for basis in bases if basis.group == group]
        shares = torch.stack(
            [torch.bincount(labels[ordering(scores[b.name])[:top]], minlength=CLASSES) / top for b in own]
        )
        ax.bar(range(CLASSES), shares.mean(dim=0).numpy(), color=COLORS[groups.index(group) % len(COLORS)], alpha=0.75)
        ax.plot(range(CLASSES), base.numpy(), linestyle="none", marker="_", color=INK, markersize=14)
        if len(own) > 1:
            for share in shares:
                ax.plot(range(CLASSES), share.numpy(), linestyle="none", marker=".", color=INK, markersize=4)
        ax.set_xticks(range(CLASSES))
        ax.set_title(group.replace("_", " "), loc="left", fontsize=10.5, fontweight="bold")
        _quiet(ax)
    figure.supxlabel(f"label of the {top} images of highest {kind} leverage; lines: of all images")
    figure.supylabel("share")
    return figure


def _mosaic(ax: Axes, images: Images, order: Tensor, title: str) -> None:
    rows, columns = PICTURE
    side = images.side
    canvas = np.zeros((rows * columns, side * side))
    chosen = order[: rows * columns]
    canvas[: len(chosen)] = images.pixels[chosen].numpy()
    picture = canvas.reshape(rows, columns, side, side).transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    ax.imshow(1 - picture, cmap=colormaps["gray"], vmin=0, vmax=1, interpolation="nearest")
    ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    ax.set_axis_off()


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _quiet(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
