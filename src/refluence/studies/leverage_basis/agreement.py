"""Question 2: how far the bases agree about leverage, with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, combinations_with_replacement
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.evaluation.bootstrap import RESAMPLES, percentile_interval, resample_counts
from refluence.evaluation.rankings import (
    corrected_overlap,
    kendall_tau,
    overlaps,
    rank_biased_overlap,
    spearman_rho,
    swap_fraction,
)
from refluence.progress import track
from refluence.studies.leverage_basis.bases import Basis

TOP = 300
"""Images of a picture, and of the headline overlap."""
GRID = 60
MEASURES = ("tau", "swap_fraction", "rho", "rbo", "overlap", "kappa")


def top_of(n: int) -> int:
    """k of the headline overlap."""
    return min(TOP, n // 4)


def grid_of(n: int) -> list[int]:
    """Log-spaced k from 1 to n, with the headline's."""
    spaced = np.geomspace(1, n, GRID).round().astype(int).tolist()
    return sorted({*spaced, top_of(n)})


def compare(
    scores: Mapping[str, Float64[Tensor, " n"]], bases: Sequence[Basis], what: str, progress: bool
) -> dict[str, Tensor]:
    """Measures of every pair of bases (p,), in the order of `itertools.combinations`, and overlaps (p, grid).

    `rbo` reads to an expected depth of the headline k, `overlap` and `kappa` are at it.
    """
    pairs = list(combinations(bases, 2))
    n = len(scores[bases[0].name])
    top, grid = top_of(n), torch.tensor(grid_of(n))
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    curves = []
    for first, second in track(pairs, f"comparing rankings by {what} leverage", enabled=progress):
        a, b = scores[first.name], scores[second.name]
        common = overlaps(a, b)
        tau = kendall_tau(a, b)
        at = common[top - 1 : top].double()
        kappa = corrected_overlap(at, torch.tensor([top]), n)
        values = (
            tau,
            swap_fraction(tau),
            spearman_rho(a, b),
            rank_biased_overlap(common, top),
            float(at),
            float(kappa),
        )
        for name, value in zip(MEASURES, values, strict=True):
            found[name].append(value)
        curves.append(common[grid - 1])
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}
    return {**tensors, "overlaps": torch.stack(curves)}


def pair_frame(kind: str, tensors: Mapping[str, Tensor], bases: Sequence[Basis]) -> pd.DataFrame:
    """One row a pair of bases: kind, a, b, group_a, group_b, and the measures."""
    pairs = list(combinations(bases, 2))
    return pd.DataFrame(
        {
            "kind": kind,
            "a": [a.name for a, _ in pairs],
            "b": [b.name for _, b in pairs],
            "group_a": [a.group for a, _ in pairs],
            "group_b": [b.group for _, b in pairs],
            **{name: tensors[name].numpy() for name in MEASURES},
        }
    )


def matrix_of(values: Float64[Tensor, " p"], size: int) -> Float64[Tensor, "b b"]:
    """The symmetric matrix of a measure, 1 on the diagonal."""
    matrix = torch.eye(size, dtype=torch.float64)
    i, j = torch.triu_indices(size, size, offset=1)
    matrix[i, j] = matrix[j, i] = values
    return matrix


def group_means(
    kind: str, tensors: Mapping[str, Tensor], bases: Sequence[Basis], confidence: float = 0.95
) -> pd.DataFrame:
    """The mean of every measure over the pairs of two groups, with a bootstrap interval over seeds.

    Networks of one seed start from the same weights, so two groups of networks have a row for pairs of "different"
    seeds and one for the "same" seed. A resample draws the seeds, one draw for all groups, and counts a pair of seeds s
    and t c_s·c_t times: pairs that share a seed are not independent, and resampling pairs would say that they are.
    Without seeds there is no interval.
    """
    pairs = list(combinations(bases, 2))
    counts = resample_counts(max(basis.seed for basis in bases), RESAMPLES, 0, "seeds")
    groups = list(dict.fromkeys(basis.group for basis in bases))
    rows: list[dict[str, Any]] = []
    for first, second in combinations_with_replacement(groups, 2):
        of_groups = [i for i, (a, b) in enumerate(pairs) if (a.group, b.group) == (first, second)]
        for seeds in ("different", "same"):
            chosen = [i for i in of_groups if _shares_seed(*pairs[i]) == (seeds == "same")]
            if not chosen:
                continue
            weights = torch.stack([_weight(*pairs[i], counts) for i in chosen], dim=1)
            for measure in MEASURES:
                values = tensors[measure][chosen]
                draws = (weights @ values) / weights.sum(dim=1)
                varies = bool(weights.std() > 0)
                low, high = map(float, percentile_interval(draws, confidence)) if varies else (math.nan, math.nan)
                rows.append(
                    {
                        "kind": kind,
                        "measure": measure,
                        "group_a": first,
                        "group_b": second,
                        "seeds": seeds,
                        "mean": float(values.mean()),
                        "low": low,
                        "high": high,
                        "smallest": float(values.min()),
                        "largest": float(values.max()),
                        "pairs": len(chosen),
                    }
                )
    return pd.DataFrame(rows)


def _shares_seed(a: Basis, b: Basis) -> bool:
    return a.seed == b.seed and a.seed > 0


def _weight(a: Basis, b: Basis, counts: Float64[Tensor, "r s"]) -> Float64[Tensor, " r"]:
    """How often a pair is in each resample; resamples that hold no pair have a mean of NaN, which is left out."""
    weight = torch.ones(len(counts), dtype=torch.float64)
    for seed in {basis.seed for basis in (a, b) if basis.seed}:
        weight = weight * counts[:, seed - 1]
    return weight
