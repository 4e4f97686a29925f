"""The summed losses of many parameter vectors of one model, with their gradients, over all data or over some rows.

Axis letters: m parameter vectors, d parameters, n examples, s rows of a set.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from refluence.batches import Batches, Data, tree_map
from refluence.gradients.checks import check_deterministic, check_independent
from refluence.isolation import evaluation_mode
from refluence.task import Task

BATCH_ROWS = 1024
PROBE_ROWS = 3
WORKING_COPIES = 8
"""Copies of a parameter vector that an evaluation and a step hold at once."""

Value = Float64[Tensor, " m"]
Gradient = Float64[Tensor, "m d"]


class Sums(ABC):
    """Σ_j ℓ_j(θ) and its gradient for every row θ of a matrix."""

    n: int
    d: int
    rounding: float = 1e-12
    """Relative change of a value that is no more than its rounding."""

    @abstractmethod
    def of_all(self, thetas: Float64[Tensor, "m d"]) -> tuple[Value, Gradient]:
        """Over all examples."""

    @abstractmethod
    def of_sets(self, thetas: Float64[Tensor, "m d"], sets: Sequence[Sequence[int]]) -> tuple[Value, Gradient]:
        """For each θ over a set of examples of its own; an empty one gives zeros."""

    @abstractmethod
    def together(self, memory: int, copies: int) -> int:
        """How many parameter vectors fit the memory, each with `copies` vectors of its length beside it."""


class _Losses(nn.Module):
    """The per-example losses as a module, so that `functional_call` can put other parameters under it."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Any) -> Tensor:
        return self.task.losses(self.task.output(self.model, batch), batch)


class ModelSums(Sums):
    """Sums for any model, by `torch.func`: vectorised over the parameter vectors, streamed over the data.

    Args:
        model: a float64 copy of the task's model, which is taken over.
    """

    def __init__(self, task: Task, model: nn.Module, train: Data) -> None:
        # Else the graph of parameters that are not attributed would be kept.
        self.task, self.model = task, model.requires_grad_(False)
        self.batches = Batches(train, BATCH_ROWS, dtype=torch.float64, device=device_of(model), name="train")
        self.n = self.batches.n
        self.names = task.parameter_names()
        own = dict(model.named_parameters())
        self.shapes = [own[name].shape for name in self.names]
        self.d = sum(shape.numel() for shape in self.shapes)
        self._losses = _Losses(task, model)
        self._vectorised = True
        with evaluation_mode(model):
            probe = self.batches.select(range(min(PROBE_ROWS, self.n)))
            check_deterministic(model, self._objective, probe)
            check_independent(model, self._objective, probe, "train", "loss")

    def _objective(self, model: nn.Module, batch: Any) -> Tensor:
        return self.task.losses(self.task.output(model, batch), batch)

    def of_all(self, thetas: Float64[Tensor, "m d"]) -> tuple[Value, Gradient]:
        """Over all examples."""
        values, gradients = thetas.new_zeros(len(thetas)), torch.zeros_like(thetas)
        with evaluation_mode(self.model):
            for _, batch in self.batches:
                value, gradient = self._of_batch(thetas, batch, shared=True)
                values += value
                gradients += gradient
        return values, gradients

    def of_sets(self, thetas: Float64[Tensor, "m d"], sets: Sequence[Sequence[int]]) -> tuple[Value, Gradient]:
        """For each θ over a set of examples of its own; an empty one gives zeros."""
        values, gradients = thetas.new_zeros(len(thetas)), torch.zeros_like(thetas)
        with evaluation_mode(self.model):
            for which, rows in pieces(sets, BATCH_ROWS):
                batch = indexed(self.batches.select(rows.flatten().tolist()), torch.arange(rows.numel()).view_as(rows))
                value, gradient = self._of_batch(thetas[which], batch, shared=False)
                values[which] += value
                gradients[which] += gradient
        return values, gradients

    def together(self, memory: int, copies: int) -> int:
        """How many parameter vectors fit the memory, each with `copies` vectors of its length beside it."""
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        batch = self.batches.select(range(min(BATCH_ROWS, self.n)))
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with evaluation_mode(self.model), torch.enable_grad(), hooks:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in self.names)
            self._losses(batch).sum()
        return max(1, memory // (2 * kept + 8 * self.d * (WORKING_COPIES + copies)))

    def _of_batch(self, thetas: Float64[Tensor, "m d"], batch: Any, shared: bool) -> tuple[Value, Gradient]:
        """Values and gradients on a batch that all θ share, or whose leaves have a first dimension over them."""
        function = grad_and_value(self._summed)
        if self._vectorised:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    gradients, values = vmap(function, (0, None if shared else 0))(thetas, batch)
                return values, gradients
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                self._vectorised = False
        single = [self._one(theta, batch if shared else indexed(batch, i)) for i, theta in enumerate(thetas)]
        return torch.stack([value for value, _ in single]), torch.stack([gradient for _, gradient in single])

    def _one(self, theta: Float64[Tensor, " d"], batch: Any) -> tuple[Tensor, Tensor]:
        """By autograd, for models that `torch.func` cannot follow."""
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            value = self._summed(leaf, batch)
            return value.detach(), torch.autograd.grad(value, leaf)[0]

    def _summed(self, theta: Float64[Tensor, " d"], batch: Any) -> Tensor:
        sizes = [shape.numel() for shape in self.shapes]
        named = {
            f"model.{name}": piece.reshape(shape)
            for name, piece, shape in zip(self.names, theta.split(sizes), self.shapes, strict=True)
        }
        return functional_call(self._losses, named, (batch,)).sum()


def pieces(sets: Sequence[Sequence[int]], rows: int) -> Iterator[tuple[Int64[Tensor, " g"], Int64[Tensor, "g s"]]]:
    """(which sets, as many rows of each) in rectangles of at most about `rows` rows, over the sets that have any."""
    by_size: dict[int, list[int]] = {}
    for i, rows_of_set in enumerate(sets):
        by_size.setdefault(len(rows_of_set), []).append(i)
    for size, which in sorted(by_size.items()):
        width = min(size, rows)
        for first in range(0, size, max(1, width)):
            last = min(first + width, size)
            for some in torch.tensor(which).split(max(1, rows // (last - first))):
                yield some, torch.tensor([list(sets[i])[first:last] for i in some.tolist()])


def indexed(batch: Any, index: int | Int64[Tensor, "..."]) -> Any:
    """Every tensor of a batch at `index`."""
    return tree_map(lambda tensor: tensor[index], batch)


def float64_copy(model: nn.Module) -> nn.Module:
    """A copy of a model in float64."""
    return copy.deepcopy(model).double()


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next(model.parameters()).device


def flat_parameters(model: nn.Module, names: Sequence[str]) -> Float64[Tensor, " d"]:
    """Parameters as one vector, in the order of `names`."""
    own = dict(model.named_parameters())
    return torch.cat([own[name].detach().double().flatten() for name in names])
