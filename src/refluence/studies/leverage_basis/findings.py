"""What the numbers say, a paragraph a question, made from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from refluence.studies.leverage_basis.arms import Arm
from refluence.studies.leverage_basis.bases import CLASSIFICATION, NETWORKS, RAW, REGRESSION, UNTRAINED
from refluence.studies.leverage_basis.outcome import agreed, value
from refluence.studies.leverage_basis.trainings import CONVOLUTIONAL, NETWORK

TOP = f"{RAW}_top"
PARITY = 0.005
"""Test accuracy less than this below random counts as equal."""


def findings(
    table: pd.DataFrame,
    means: pd.DataFrame,
    basis: pd.DataFrame,
    artefact: Mapping[str, Any],
    arms: Sequence[Arm],
    sizes: Sequence[int],
    top: int,
) -> list[tuple[str, str]]:
    """(title, paragraph) for each question."""
    return [
        ("Does training on rows of high leverage pay?", _training(table, arms, sizes)),
        ("Is leverage robust to the network's initialisation?", _robust(means, top)),
        ("Does it depend on the basis?", _bases(means, basis)),
        ("What unpivoted QR in float32 gets wrong", _artefact(artefact)),
    ]


def _training(table: pd.DataFrame, arms: Sequence[Arm], sizes: Sequence[int]) -> str:
    below = [k for k in sizes if not math.isnan(value(table, NETWORK, TOP, k))]
    gaps = {k: value(table, NETWORK, "random", k) - value(table, NETWORK, TOP, k) for k in below}
    worst = max(gaps, key=lambda k: gaps[k])
    equal = [k for k in below if all(gaps[j] < PARITY for j in below if j >= k)]
    last = (
        f"from k = {equal[0]:,} on the gap is below {100 * PARITY:.1f} points"
        if equal
        else f"at k = {below[-1]:,} it is still {100 * gaps[below[-1]]:.1f} points"
    )
    text = (
        f"The gap between random rows and those of highest leverage in raw pixels is largest at k = {worst:,}, "
        f"{100 * gaps[worst]:.1f} points of the small network's test accuracy "
        f"({_percent(value(table, NETWORK, 'random', worst))} against {_percent(value(table, NETWORK, TOP, worst))}); "
        f"{last}. {_comparisons(table, arms, below)}"
    )
    convolutional = table[table["model"] == CONVOLUTIONAL]
    for k in sorted(set(convolutional["k"])):
        shares = [value(table, CONVOLUTIONAL, arm, int(k)) for arm in ("random", TOP, f"{REGRESSION}_top")]
        text += (
            f" The embedding's architecture at k = {k:,}: random {_percent(shares[0])}, raw leverage "
            f"{_percent(shares[1])}, leverage in the regression embedding {_percent(shares[2])}."
        )
    return text


def _comparisons(table: pd.DataFrame, arms: Sequence[Arm], sizes: Sequence[int]) -> str:
    """How many arms are worse or better than random rows, by intervals that do not meet."""
    worse: list[tuple[str, int]] = []
    better: list[tuple[str, int]] = []
    compared = 0
    for arm in (arm for arm in arms if arm.name != "random"):
        for k in sizes:
            low, high = (value(table, NETWORK, arm.name, k, column=name) for name in ("low", "high"))
            if math.isnan(low):
                continue
            compared += 1
            if high < value(table, NETWORK, "random", k, column="low"):
                worse.append((arm.title, k))
            if low > value(table, NETWORK, "random", k, column="high"):
                better.append((arm.title, k))
    text = (
        f"Of {compared} comparisons of an arm with random rows at one k, {len(worse)} are worse and {len(better)} "
        "better by intervals that do not meet"
    )
    titles = dict.fromkeys(title for title, _ in better)
    each = [f"{title} (k = {', '.join(f'{k:,}' for t, k in better if t == title)})" for title in titles]
    return text + (f"; better are {'; '.join(each)}." if each else ".")


def _robust(means: pd.DataFrame, top: int) -> str:
    parts = []
    for kind, words in (("plain", "plain leverage"), ("ridge", "ridge leverage at matched d_λ")):
        each = [
            f"{group} τ = {_interval(agreed(means, kind, 'tau', group, group))}, "
            f"κ@{top} = {_interval(agreed(means, kind, 'kappa', group, group))}"
            for group in NETWORKS
        ]
        parts.append(f"Of {words} between networks that differ by their seed alone: {'; '.join(each)}.")
    taus = {group: agreed(means, "plain", "tau", group, group)["mean"] for group in NETWORKS}
    best = max(taus, key=lambda group: taus[group])
    kappa = agreed(means, "plain", "kappa", best, best)["mean"]
    parts.append(
        f"The plain ranking is most alike for {best}, where {100 * (1 - taus[best]) / 2:.0f} % of the pairs of images "
        f"still change places with the seed, and the {top} highest agree to {100 * kappa:.0f} % beyond chance."
    )
    same, other = (
        {kind: agreed(means, kind, "tau", CLASSIFICATION, REGRESSION, seeds)["mean"] for kind in ("plain", "ridge")}
        for seeds in ("same", "different")
    )
    own = {kind: agreed(means, kind, "tau", CLASSIFICATION, CLASSIFICATION)["mean"] for kind in ("plain", "ridge")}
    parts.append(
        "Two networks that start from the same weights and are trained for different targets (A with B of one seed) "
        f"have τ = {same['plain']:.3f} plain and {same['ridge']:.3f} ridge; from different weights "
        f"{other['plain']:.3f} and {other['ridge']:.3f}; two trained for the same target (A with A) "
        f"{own['plain']:.3f} and {own['ridge']:.3f}."
    )
    return " ".join(parts)


def _bases(means: pd.DataFrame, basis: pd.DataFrame) -> str:
    each = []
    for a, b in ((CLASSIFICATION, REGRESSION), (CLASSIFICATION, UNTRAINED), (REGRESSION, UNTRAINED)):
        plain, ridge = (agreed(means, kind, "tau", a, b) for kind in ("plain", "ridge"))
        each.append(f"{a}–{b} {_interval(plain)}, ridge {ridge['mean']:.3f}")
    raw = [f"{group} {_interval(agreed(means, 'plain', 'tau', RAW, group))}" for group in NETWORKS]
    ranks = []
    for group in NETWORKS:
        own = basis[basis["group"] == group]
        ranks.append(f"{group} {own['rank_all'].min()} to {own['rank_all'].max()}")
    columns = int(basis[basis["group"] == CLASSIFICATION]["columns"].iloc[0])
    return (
        f"Between embeddings of different groups and seeds τ is {'; '.join(each)}; of raw pixels "
        f"with {', '.join(raw)}. The ranks are {', '.join(ranks)} of {columns}, because units are 0 for every image; "
        "plain leverage counts every direction alike however small, so that part of a low agreement is rank. Ridge "
        "leverage with the same d_λ in every basis leaves that out."
    )


def _artefact(facts: Mapping[str, Any]) -> str:
    overlap = ", ".join(f"{100 * share:.0f} % of the {int(k):,} highest" for k, share in facts["overlap"].items())
    return (
        f"Its leverage adds up to {facts['sum_wrong']:.1f} where the rank is {facts['sum_right']:.0f}: "
        f"{facts['spurious']} images have a leverage near 1 for no reason but their place in the data set, "
        f"{facts['first_rows']} of the first 20 among them. It gets {overlap} right; Kendall's τ of the whole ranking, "
        f"{facts['tau']:.3f}, does not show it."
    )


def _percent(share: float) -> str:
    return "not run" if math.isnan(share) else f"{100 * share:.1f} %"


def _interval(found: Mapping[str, float]) -> str:
    if math.isnan(found["low"]):
        return f"{found['mean']:.3f}"
    return f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
