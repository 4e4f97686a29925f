"""Rows whose mean embedding follows that of all rows."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from refluence.errors import DataError
from refluence.progress import track

CHUNK_NUMBERS = 1 << 24


def herding(
    X: Float64[Tensor, "n d"], k: int, bandwidth: float | None = None, *, progress: bool = True
) -> Int64[Tensor, " k"]:
    """Kernel herding without repetition: step t takes argmax μ(x_i) − (1/t) Σ_{s<t} κ(x_i, x_s).

    μ is the mean embedding (1/n) Σ_j κ(·, x_j): greedy for the maximum mean discrepancy between those chosen and all.
    κ is the inner product, or with a bandwidth b the Gaussian exp(−‖x − y‖²/(2b²)), whose means take O(n²·d); each step
    takes O(n·d).

    Raises:
        DataError: a bandwidth that is not positive and finite.

    Source: Chen, Welling & Smola 2010 (arXiv 1203.3472).
    """
    if bandwidth is not None and not (math.isfinite(bandwidth) and bandwidth > 0):
        raise DataError(f"the bandwidth of herding must be above 0, not {bandwidth!r}; None is the inner product")
    centred = X if bandwidth is None else X - X.mean(dim=0)
    norms = centred.square().sum(dim=1)

    def kernel(rows: Tensor) -> Tensor:
        products = centred @ centred[rows].T
        if bandwidth is None:
            return products
        return torch.exp(-(norms[:, None] + norms[rows] - 2 * products).clamp(min=0) / (2 * bandwidth**2))

    n = len(X)
    if bandwidth is None:
        mean = X @ X.mean(dim=0)
    else:
        parts = torch.arange(n).split(max(1, CHUNK_NUMBERS // n))
        mean = torch.cat([kernel(rows).mean(dim=0) for rows in track(parts, "mean embedding", enabled=progress)])
    chosen = torch.zeros(k, dtype=torch.int64)
    total = torch.zeros_like(mean)
    free = torch.zeros_like(mean)
    for step in track(range(k), "herding", enabled=progress):
        row = int((mean - total / (step + 1) + free).argmax())
        chosen[step] = row
        free[row] = -torch.inf
        total += kernel(torch.tensor([row]))[:, 0]
    return chosen
