"""Summed losses held to the model as it is: the Bregman divergence of the outputs in place of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from refluence.batches import Batches
from refluence.errors import DataError
from refluence.evaluation.sums import (
    BATCH_ROWS,
    Gradient,
    ModelSums,
    Sums,
    Value,
    device_of,
    flat_parameters,
    float64_copy,
)
from refluence.isolation import evaluation_mode
from refluence.task import Task


class HeldSums(Sums):
    """Σ_j [D_j(θ) + (λ/2)‖θ − θ̂‖² − l2⟨θ̂, θ⟩] over all examples, Σ ℓ_j(θ) over sets.

    D_j = ℓ(f_j) − ⟨∂ℓ/∂f(f̂_j), f_j⟩, so that θ̂ is a minimum whatever the model was trained to. Leaving a set out
    then takes its *losses* away: the proximal Bregman response of Bae et al. 2022 (arXiv 2209.05364), whose first order
    is the influence by the GGN.

    Args:
        train: one batch of all training examples.
        dampings: λ of each parameter.

    Raises:
        DataError: outputs that are no tensor.
    """

    def __init__(self, task: Task, train: Any, dampings: Mapping[str, float]) -> None:
        self.plain = ModelSums(task, float64_copy(task.model), train)
        slopes = _output_slopes(task, train)
        self.held = ModelSums(_held(task, dampings), float64_copy(task.model), (train, slopes))
        self.n, self.d = self.plain.n, self.plain.d

    def of_all(self, thetas: Float64[Tensor, "m d"]) -> tuple[Value, Gradient]:
        """The held objective of all examples."""
        return self.held.of_all(thetas)

    def of_sets(self, thetas: Float64[Tensor, "m d"], sets: Sequence[Sequence[int]]) -> tuple[Value, Gradient]:
        """The losses of the examples that are left out."""
        return self.plain.of_sets(thetas, sets)

    def together(self, memory: int, copies: int) -> int:
        """How many parameter vectors fit the memory, each with `copies` vectors of its length beside it."""
        return self.held.together(memory, copies)


def _output_slopes(task: Task, train: Any) -> Float64[Tensor, "n ..."]:
    """∂ℓ_j/∂f_j of every example at the model."""
    model = float64_copy(task.model)
    found = []
    with evaluation_mode(model):
        for _, batch in Batches(train, BATCH_ROWS, dtype=torch.float64, device=device_of(model), name="train"):
            with torch.no_grad():
                output = task.output(model, batch)
            if not isinstance(output, Tensor):
                raise DataError(
                    f"the model's output is a {type(output).__name__}, and holding the refits to the model needs a "
                    "tensor: give `forward` to select it, or train with l2 > 0"
                )
            with torch.enable_grad():
                leaf = output.detach().requires_grad_()
                [slope] = torch.autograd.grad(task.losses(leaf, batch).sum(), leaf)
            found.append(slope)
    return torch.cat(found)


def _held(task: Task, dampings: Mapping[str, float]) -> Task:
    """The task of D_j with damping, on batches (batch, ∂ℓ/∂f)."""
    names = task.parameter_names()
    own = dict(task.model.named_parameters())
    theta = flat_parameters(task.model, names)
    parts = list(zip(names, theta.split([own[name].numel() for name in names]), strict=True))

    def forward(model: nn.Module, pair: Any) -> tuple[Tensor, Tensor]:
        parameters = dict(model.named_parameters())
        extra = theta.new_zeros(())
        for name, at in parts:
            moved = parameters[name].flatten() - at
            extra = extra + dampings[name] / 2 * moved.square().sum() - task.l2 * (moved @ at)
        return task.output(model, pair[0]), extra

    def losses(outputs: tuple[Tensor, Tensor], pair: Any) -> Tensor:
        output, extra = outputs
        straight = (output * pair[1]).reshape(output.shape[0], -1).sum(dim=1)
        return task.losses(output, pair[0]) - straight + extra

    return replace(task, forward=forward, loss=losses, measurement=None)
