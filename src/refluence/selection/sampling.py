"""Rows drawn at random in proportion to sizes such as ridge leverage scores, with the weights that undo it."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from refluence.errors import DataError

Drawn = tuple[Int64[Tensor, " r"], Float64[Tensor, " r"]]


def sampling(sizes: Float64[Tensor, " n"], k: int, generator: np.random.Generator) -> Drawn:
    """k draws with replacement, row i with probability p_i = s_i/Σs at each; w_i = c_i/(k p_i) for c_i draws.

    A row that is drawn several times is given once, with the sum of its weights, so that there may be fewer than k
    rows. E[Σ w_i f(i)] = Σ f(i) over the rows with p_i > 0. Rows are in the order of their first draw.

    Source: Drineas, Kannan & Mahoney 2006; with ridge leverage Cohen, Musco & Musco 2017 (arXiv 1511.07263).
    """
    p = _probabilities(sizes)
    drawn = torch.from_numpy(generator.choice(len(p), size=k, replace=True, p=p))
    rows, first, counts = _first_draws(drawn)
    order = first.argsort()
    rows, counts = rows[order], counts[order]
    return rows, counts.double() / (k * torch.from_numpy(p)[rows])


def distinct_sampling(sizes: Float64[Tensor, " n"], k: int, generator: np.random.Generator) -> Drawn:
    """Exactly k distinct rows, row i with probability π_i = min(1, c s_i), Σπ = k; w_i = 1/π_i.

    Systematic sampling in random order: the rows, shuffled, lie one after the other on a line, row i over a length π_i,
    and those under the marks u, u + 1, u + 2, … are taken, u uniform in [0, 1). Σ w_i f(i) is unbiased.

    Raises:
        DataError: fewer than k rows have a positive size.

    Source: Madow 1949; Horvitz & Thompson 1952.
    """
    inclusion = inclusion_probabilities(sizes, k)
    order = generator.permutation(len(inclusion))
    ends = np.cumsum(inclusion.numpy()[order])
    ends *= k / ends[-1]  # so that rounding does not lose the last mark
    marks = np.arange(k) + generator.random()
    rows = torch.from_numpy(order[np.searchsorted(ends, marks, side="right").clip(max=len(ends) - 1)])
    return rows, 1 / inclusion[rows]


def inclusion_probabilities(sizes: Float64[Tensor, " n"], k: int) -> Float64[Tensor, " n"]:
    """π_i = min(1, c s_i) with the c for which Σπ = k.

    Raises:
        DataError: fewer than k rows have a positive size.
    """
    s = _checked(sizes)
    positive = int((s > 0).sum())
    if positive < k:
        raise DataError(f"{k} distinct rows are asked for, and {positive} have a size above 0: ask for no more")
    certain = torch.zeros(len(s), dtype=torch.bool)
    while True:
        rest = s.masked_fill(certain, 0)
        scaled = rest * ((k - int(certain.sum())) / rest.sum().clamp(min=torch.finfo(s.dtype).tiny))
        more = (scaled >= 1) & ~certain
        if not bool(more.any()):
            return torch.where(certain, 1.0, scaled)
        certain |= more


def _probabilities(sizes: Float64[Tensor, " n"]) -> np.ndarray:
    s = _checked(sizes).numpy()
    return s / s.sum()


def _checked(sizes: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    wrong = ~torch.isfinite(sizes) | (sizes < 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise DataError(f"sampling needs sizes that are finite and ≥ 0; row {row} has {float(sizes[row])}")
    if not bool((sizes > 0).any()):
        raise DataError("sampling needs a size above 0, and every row has 0")
    return sizes


def _first_draws(drawn: Int64[Tensor, " m"]) -> tuple[Tensor, Tensor, Tensor]:
    """(the distinct rows, where each is drawn first, how often)."""
    rows, first, counts = np.unique(drawn.numpy(), return_index=True, return_counts=True)
    return torch.from_numpy(rows), torch.from_numpy(first), torch.from_numpy(counts)
