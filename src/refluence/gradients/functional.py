"""Per-example gradients of any parameter of any differentiable model, through `torch.func` or one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from refluence.batches import rows_of, slice_rows, tree_map

Objective = Callable[[nn.Module, Any], Float[Tensor, " n"]]

MAX_CHUNK_ELEMENTS = 1 << 26


class _Values(nn.Module):
    """The objective as a module, so that `functional_call` can put other parameters under it."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Any) -> Tensor:
        return self.objective(self.model, batch)


def vectorised_gradients(
    model: nn.Module, objective: Objective, names: Sequence[str], batch: Any
) -> dict[str, Float[Tensor, "n d"]]:
    """`vmap(grad)` over the examples of a batch: name → rows.

    Raises:
        RuntimeError: an operation of the model that `vmap` cannot follow (data-dependent control flow, some RNNs).
    """
    values = _Values(model, objective)
    own = dict(model.named_parameters())
    parameters = {f"model.{name}": own[name].detach() for name in names}

    def value(chosen: Mapping[str, Tensor], example: Any) -> Tensor:
        return functional_call(values, dict(chosen), (tree_map(lambda x: x[None], example),)).sum()

    size = sum(parameter.numel() for parameter in parameters.values())
    chunk = max(1, MAX_CHUNK_ELEMENTS // max(1, size))
    with warnings.catch_warnings():
        # What vmap has no batching rule for it runs one by one: slower, which the plan measures, and right.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        rows = vmap(grad(value), in_dims=(None, 0), chunk_size=min(chunk, rows_of(batch)))(parameters, batch)
    return {name: rows[f"model.{name}"].detach().reshape(rows_of(batch), -1) for name in names}


def single_gradients(
    model: nn.Module, objective: Objective, names: Sequence[str], batch: Any
) -> dict[str, Float[Tensor, "n d"]]:
    """One backward pass an example: works for whatever autograd differentiates."""
    own = dict(model.named_parameters())
    parameters = [own[name] for name in names]
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for i in range(rows_of(batch)):
        value = objective(model, slice_rows(batch, i, i + 1)).sum()
        gradients = (
            torch.autograd.grad(value, parameters, allow_unused=True)
            if value.requires_grad
            else [None] * len(parameters)
        )
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
            rows[name].append((torch.zeros_like(parameter) if gradient is None else gradient).detach().flatten())
    return {name: torch.stack(gradients) for name, gradients in rows.items()}
