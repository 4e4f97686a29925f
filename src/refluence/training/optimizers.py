"""The optimisers of a recipe, elementwise, so that they serve one model's parameters and stacked ones alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from refluence.errors import DataError
from refluence.task import Task
from refluence.training.recipe import Recipe


def objective_l2(task: Task, recipe: Recipe) -> float:
    """The l2 of the training objective: the task's or the recipe's, whichever is not zero.

    Raises:
        DataError: both are given and differ.
    """
    if task.l2 and recipe.l2 and task.l2 != recipe.l2:
        raise DataError(f"the task's l2 is {task.l2:g} and the recipe's {recipe.l2:g}: give one, or the same twice")
    return task.l2 or recipe.l2


class Updates:
    """The steps of a recipe on tensors in place.

    Args:
        parameters: of one model, or of m models stacked along the first dimension.
        recipe: the optimiser, its settings and its schedule.
        l2: of the objective; its gradient is added after clipping.
        total: steps of the whole training, for the schedule.
        stacked: whether each parameter is (m, ...); gradients are then clipped model by model.
    """

    def __init__(self, parameters: Sequence[Tensor], recipe: Recipe, l2: float, total: int, stacked: bool) -> None:
        self.recipe, self.total, self.stacked = recipe, total, stacked
        self.step = 0
        # The fused kernels copy what is not contiguous, so they see the dimensions in the order of memory.
        self._orders = [_memory_order(parameter) for parameter in parameters]
        self._parameters = [p.detach().permute(order) for p, order in zip(parameters, self._orders, strict=True)]
        # AdamW's own decay is not of the objective, so that its l2 has to be added to the gradient by hand.
        self._added_l2 = l2 if recipe.optimizer == "adamw" else 0.0
        self.optimizer = _optimizer(self._parameters, recipe, l2)

    @torch.no_grad()
    def apply(self, gradients: Sequence[Tensor]) -> None:
        """One step along the gradients of the mean loss, which are overwritten."""
        if self.recipe.clip is not None or self._added_l2:
            gradients = _apart(gradients, self._parameters)
        if self.recipe.clip is not None:
            _clip(gradients, self.recipe.clip, self.stacked)
        for parameter, order, gradient in zip(self._parameters, self._orders, gradients, strict=True):
            parameter.grad = gradient.permute(order).contiguous()
            if self._added_l2:
                parameter.grad.add_(parameter, alpha=self._added_l2)
        self.optimizer.param_groups[0]["lr"] = self.recipe.step_size(self.step, self.total)
        self.optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None
        self.step += 1

    @property
    def state(self) -> dict[str, Tensor]:
        """What the optimiser remembers: "index of the parameter/what" → tensor."""
        return {
            f"{i}/{key}": tensor
            for i, parameter in enumerate(self._parameters)
            for key, tensor in self.optimizer.state[parameter].items()
            if isinstance(tensor, Tensor)
        }

    def resume(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Go on after so many steps, with what the optimiser then remembered."""
        self.step = step
        for name, tensor in state.items():
            index, _, key = name.partition("/")
            parameter = self._parameters[int(index)]
            self.optimizer.state[parameter][key] = tensor.to(parameter.device)


def _memory_order(tensor: Tensor) -> list[int]:
    """The dimensions from the largest stride to the smallest."""
    strides = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim))


def _optimizer(parameters: list[Tensor], recipe: Recipe, l2: float) -> torch.optim.Optimizer:
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    match recipe.optimizer:
        case "sgd":
            return torch.optim.SGD(
                parameters, lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=l2, fused=fused
            )
        case "adam":
            return torch.optim.Adam(
                parameters, recipe.learning_rate, recipe.betas, recipe.epsilon, weight_decay=l2, fused=fused
            )
        case "adamw":
            return torch.optim.AdamW(
                parameters,
                recipe.learning_rate,
                recipe.betas,
                recipe.epsilon,
                weight_decay=recipe.weight_decay,
                fused=fused,
            )


def _apart(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, each in memory of its own: those of a + b are one tensor, and that of a sum is one number."""
    seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    found = []
    for gradient in gradients:
        place = gradient.untyped_storage().data_ptr()
        found.append(gradient.clone() if place in seen or 0 in gradient.stride() else gradient)
        seen.add(place)
    return found


def _clip(gradients: Sequence[Tensor], largest: float, stacked: bool) -> None:
    """Scale the gradients of each model so that their joint norm is at most `largest`."""
    each = [gradient.flatten(1).square().sum(dim=1) if stacked else gradient.square().sum() for gradient in gradients]
    squares = torch.stack(each).sum(dim=0)
    scale = (largest / (squares.sqrt() + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
    for gradient in gradients:
        gradient.mul_(scale.reshape(-1, *[1] * (gradient.ndim - 1)) if stacked else scale)
