"""Dense float64 references, written without any part of the library."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def one_row(batch: Any, i: int) -> Any:
    """Example i as a batch of one."""
    if isinstance(batch, Tensor):
        return batch[i : i + 1]
    if isinstance(batch, Mapping):
        return {key: one_row(value, i) for key, value in batch.items()}
    return tuple(one_row(value, i) for value in batch)


def length(batch: Any) -> int:
    """The number of examples of a batch."""
    first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return len(first)


def loop_gradients(
    model: nn.Module, values: Callable[[nn.Module, Any], Tensor], names: Sequence[str], batch: Any
) -> Tensor:
    """Rows (n, d): `torch.autograd.grad` of the value of one example after the other, the model in eval mode."""
    model = copy.deepcopy(model).eval()
    own = dict(model.named_parameters())
    chosen = [own[name].requires_grad_() for name in names]
    rows = []
    for i in range(length(batch)):
        found = torch.autograd.grad(values(model, one_row(batch, i)).sum(), chosen, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(chosen, found, strict=True)]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def columns_of(model: nn.Module, names: Sequence[str], groups: Iterable[Sequence[str]]) -> list[Tensor]:
    """The columns of each group of parameters, in rows whose columns are `names` in order."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    starts, at = {}, 0
    for name in names:
        starts[name] = at
        at += sizes[name]
    return [torch.cat([torch.arange(starts[n], starts[n] + sizes[n]) for n in group]) for group in groups]


def curvature(G: Tensor, weights: Tensor | None = None) -> Tensor:
    """C = (1/n) Σ w g gᵀ."""
    w = torch.ones(len(G), dtype=G.dtype) if weights is None else weights
    return (G * w[:, None]).T @ G / len(G)


def bilinear(V: Tensor, G: Tensor, C: Tensor, shift: float) -> Tensor:
    """V (C + μI)⁻¹ Gᵀ by a general solve."""
    return V @ torch.linalg.solve(C + shift * torch.eye(len(C), dtype=C.dtype), G.T)


def scores(
    V: Tensor,
    G: Tensor,
    shift: float | Sequence[float],
    weights: Tensor | None = None,
    blocks: Sequence[Tensor] | None = None,
) -> Tensor:
    """Σ_b V_b (C_b + μ_b I)⁻¹ (w G_b)ᵀ."""
    blocks = [torch.arange(G.shape[1])] if blocks is None else blocks
    shifts = [shift] * len(blocks) if isinstance(shift, float) else shift
    out = sum(bilinear(V[:, b], G[:, b], curvature(G[:, b], weights), mu) for b, mu in zip(blocks, shifts, strict=True))
    return out if weights is None else out * weights


def effective_dimension(C: Tensor, shift: float) -> float:
    """tr C (C + μI)⁻¹."""
    return float(torch.linalg.solve(C + shift * torch.eye(len(C), dtype=C.dtype), C).trace())
