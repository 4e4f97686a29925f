"""Squared lengths of the rows of X W, stretch by stretch."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.leverage.examples import Examples

PANEL = 64
ROWS = 1024


def trapezoid(W: Float64[Tensor, "d r"]) -> Float64[Tensor, "d r"]:
    """W Q, lower trapezoidal, with Q orthogonal: the rows of XW and XWQ are equally long, and XWQ is half the work."""
    if W.shape[1] == 0:
        return W
    return torch.linalg.qr(W.T, mode="r").R.T


def squared_lengths(examples: Examples, W: Float64[Tensor, "k r"], description: str) -> Float64[Tensor, " n"]:
    """‖x_iᵀW‖² of every row; rows of W that are 0 in a panel of columns are left out."""
    found = torch.empty(examples.n, dtype=torch.float64, device=W.device)
    wide = examples.embed(W)
    panels = [_used(wide[:, j : j + PANEL]) for j in range(0, W.shape[1], PANEL)]
    for start, rows in examples.rows(description):
        for first in range(0, rows.shape[0], ROWS):
            some = rows[first : first + ROWS]
            total = torch.zeros(some.shape[0], dtype=torch.float64, device=W.device)
            for low, high, panel in panels:
                total += torch.linalg.vector_norm(some[:, low:high] @ panel, dim=1).square_()
            found[start + first : start + first + some.shape[0]] = total
    return found


def _used(panel: Tensor) -> tuple[int, int, Tensor]:
    """(first row, end, the rows between) of a panel that are not 0."""
    used = panel.any(dim=1).nonzero()
    if not used.numel():
        return 0, 0, panel[:0]
    low, high = int(used[0]), int(used[-1]) + 1
    return low, high, panel[low:high].contiguous()
