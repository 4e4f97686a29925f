"""Norms of the gradient of the training objective and of the examples' own gradients."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.gradients.rows import GradientRows


def gradient_norms(rows: GradientRows, weights: Float[Tensor, " n"] | None, l2: float) -> tuple[float, float]:
    """(‖(1/n) Σ w_i g_i + l2·θ‖, √((1/n) Σ w_i‖g_i‖²)), in one pass over the gradients.

    Args:
        rows: g_i.
        weights: w_i; None: all 1.
        l2: of the objective.
    """
    total, squares = rows.total(_sums, weights)
    squared = 0.0
    for group, names in rows.capture.groups.items():
        theta = torch.cat([rows.capture.parameters[name].detach().double().flatten() for name in names])
        squared += float((total[group].to(theta) / rows.batches.whole + l2 * theta).square().sum())
    return squared**0.5, (squares / rows.batches.whole) ** 0.5


def _sums(rows: GradientRows, weights: Float[Tensor, " n"] | None) -> tuple[dict[str, Float[Tensor, " d"]], float]:
    """(group → Σ w_i g_i, Σ w_i‖g_i‖²)."""
    total: dict[str, Tensor] = {}
    squares = 0.0
    for start, blocks in rows:
        for group, block in blocks.items():
            factors = torch.ones(block.n, 1, dtype=torch.float64, device=block.device)
            if weights is not None:
                at = rows.batches.first + start
                factors[:, 0] = weights[at : at + block.n]
            part = block.rmatvec(factors)[:, 0]
            total[group] = total[group] + part if group in total else part
            squares += float(block.squared_norms() @ factors[:, 0])
    return total, squares
