"""Pearson and Spearman correlations under weights: a bootstrap resample is the data with counts for weights."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor


def ranks(values: Float64[Tensor, " m"], weights: Float64[Tensor, "m r"]) -> Float64[Tensor, "m r"]:
    """Ranks, ties averaged, in each of r resamples that hold item i w_i times.

    The rank of item i is Σ_{x_j<x_i} w_j + (Σ_{x_j=x_i} w_j + 1)/2. One sort serves every resample; then O(m·r).
    """
    values = values.contiguous()
    order = values.argsort()
    ordered = values[order]
    below = torch.searchsorted(ordered, values)
    upto = torch.searchsorted(ordered, values, right=True)
    cumulated = torch.zeros(len(values) + 1, weights.shape[1], dtype=weights.dtype)
    torch.cumsum(weights[order], dim=0, out=cumulated[1:])
    return (cumulated[below] + cumulated[upto] + 1) / 2


def pearson(
    x: Float64[Tensor, "m r"], y: Float64[Tensor, "m r"], weights: Float64[Tensor, "m r"]
) -> Float64[Tensor, " r"]:
    """The weighted correlation of each column; NaN where x or y is constant."""
    total = weights.sum(dim=0)
    x = x - (weights * x).sum(dim=0) / total
    y = y - (weights * y).sum(dim=0) / total
    wx = weights * x
    spread = ((wx * x).sum(dim=0) * (weights * y * y).sum(dim=0)).sqrt()
    return torch.where(spread > 0, (wx * y).sum(dim=0) / spread, torch.nan).clamp(-1, 1)


def spearman(
    x: Float64[Tensor, " m"], y: Float64[Tensor, " m"], weights: Float64[Tensor, "m r"]
) -> Float64[Tensor, " r"]:
    """The rank correlation, ties averaged, in each of r resamples; NaN where x or y is constant."""
    return pearson(ranks(x, weights), ranks(y, weights), weights)


def spearman_columns(
    x: Float64[Tensor, "m k"], y: Float64[Tensor, "m k"], weights: Float64[Tensor, "m r"]
) -> Float64[Tensor, "r k"]:
    """`spearman` of each pair of columns, in each resample."""
    columns = [spearman(a, b, weights) for a, b in zip(x.T, y.T, strict=True)]
    return torch.stack(columns, dim=1)
