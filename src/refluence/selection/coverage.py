"""Rows that leave no row far from the nearest of them."""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from refluence.progress import track


def k_center(X: Float64[Tensor, "n d"], k: int, *, progress: bool = True) -> Int64[Tensor, " k"]:
    """Farthest-first traversal: the row nearest the mean, then each time the row farthest from those chosen.

    The largest distance of a row to the nearest chosen one is at most twice the least that k rows can have. O(n·d) a
    step; the lowest row on ties.

    Source: Gonzalez 1985; for training data Sener & Savarese 2018 (arXiv 1708.00489).
    """
    centred = X - X.mean(dim=0)
    norms = centred.square().sum(dim=1)
    chosen = torch.zeros(k, dtype=torch.int64)
    chosen[0] = int(norms.argmin())
    distance = torch.full_like(norms, torch.inf)
    for step in track(range(1, k), "farthest-first traversal", enabled=progress):
        last = chosen[step - 1]
        # By differences of squares: rounding is far below the distances that are compared.
        to_last = (norms + norms[last] - 2 * (centred @ centred[last])).clamp(min=0)
        distance = torch.minimum(distance, to_last)
        distance[last] = -1.0
        chosen[step] = int(distance.argmax())
    return chosen
