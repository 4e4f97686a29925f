"""Summed losses of models whose output is one linear layer of what does not depend on the attributed parameters.

Softmax, logistic and linear regression, and heads on frozen features: all parameter vectors share the inputs X, so the
outputs of m models are one matrix product, X [W_1 … W_m], and their gradients one more.

Axis letters: m parameter vectors, d parameters, n examples, s rows of a set, p inputs, c outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.func import functional_call, vmap

from refluence.batches import Data, rows_of, slice_rows, tensors_of, tree_map
from refluence.evaluation.sums import (
    BATCH_ROWS,
    WORKING_COPIES,
    Gradient,
    ModelSums,
    Sums,
    Value,
    device_of,
    float64_copy,
    indexed,
    pieces,
)
from refluence.execution import Execution
from refluence.gradients.recorder import Recorder, Recording
from refluence.isolation import evaluation_mode
from refluence.task import Task, batch_targets

CHUNK_ELEMENTS = 1 << 22
LEAST_ROWS = 256
EQUAL = 1e-10
SHARE_FOR_INPUTS = 0.4


def sums_of(task: Task, train: Data, execution: Execution) -> Sums:
    """The sums of a task on its training data, by one product for all where the model is one linear layer."""
    model = float64_copy(task.model)
    general = ModelSums(task, model, train)
    memory = SHARE_FOR_INPUTS * execution.budget(device_of(model))
    return linear_sums(general, memory) or general


@dataclass(frozen=True)
class Layer:
    """Which parameters the layer has: weight (c, p), or (p, c) where `transposed`, and bias (c)."""

    weight: str
    bias: str | None
    transposed: bool


class LinearSums(Sums):
    """Sums for outputs X Wᵀ + b.

    Args:
        inputs: X.
        shape: of an example's output.
        targets: what the loss reads, the examples first.
    """

    def __init__(
        self,
        task: Task,
        layer: Layer,
        sizes: dict[str, torch.Size],
        inputs: Float64[Tensor, "n p"],
        shape: torch.Size,
        targets: Any,
    ) -> None:
        self.task, self.layer, self.targets, self.shape = task, layer, targets, shape
        self.n, self.c = inputs.shape[0], shape.numel()
        self.d = sum(size.numel() for size in sizes.values())
        starts, total = {}, 0
        for name, size in sizes.items():
            starts[name] = total
            total += size.numel()
        matrix = torch.arange(inputs.shape[1] * self.c, device=inputs.device) + starts[layer.weight]
        index = matrix.reshape(-1, self.c).T if layer.transposed else matrix.reshape(self.c, -1)
        used = (inputs != 0).any(dim=0)
        index, inputs = index[:, used], inputs[:, used]
        if layer.bias is not None:
            index = torch.cat([index, starts[layer.bias] + torch.arange(self.c, device=inputs.device)[:, None]], dim=1)
            inputs = torch.cat([inputs, inputs.new_ones(self.n, 1)], dim=1)
        self.inputs, self.index = inputs.contiguous(), index.contiguous()
        self._vectorised = True

    def of_all(self, thetas: Float64[Tensor, "m d"]) -> tuple[Value, Gradient]:
        """Over all examples."""
        m = len(thetas)
        weights = thetas[:, self.index].flatten(0, 1)
        values, sums = thetas.new_zeros(m), torch.zeros_like(weights)
        step = max(LEAST_ROWS, CHUNK_ELEMENTS // max(1, m * self.c))
        for first in range(0, self.n, step):
            last = min(first + step, self.n)
            x = self.inputs[first:last]
            outputs = (x @ weights.T).unflatten(1, (m, self.c))
            value, errors = self._errors(outputs, slice_rows(self.targets, first, last), (1, None))
            values += value
            sums.addmm_(errors.flatten(1).T, x)
        return values, self._scattered(sums.unflatten(0, (m, self.c)))

    def of_sets(self, thetas: Float64[Tensor, "m d"], sets: Sequence[Sequence[int]]) -> tuple[Value, Gradient]:
        """For each θ over a set of examples of its own; an empty one gives zeros."""
        values = thetas.new_zeros(len(thetas))
        sums = thetas.new_zeros(len(thetas), *self.index.shape)
        for which, rows in pieces(sets, BATCH_ROWS):
            rows = rows.to(thetas.device)
            x = self.inputs[rows]
            outputs = torch.bmm(x, thetas[which][:, self.index].mT)
            batch = indexed(self.targets, rows)
            value, errors = self._errors(outputs, batch, (0, 0))
            values[which] += value
            sums[which] += torch.bmm(errors.mT, x)
        return values, self._scattered(sums)

    def together(self, memory: int, copies: int) -> int:
        """How many parameter vectors fit the memory, each with `copies` vectors of its length beside it."""
        return max(1, memory // (8 * (self.d * (WORKING_COPIES + copies) + 4 * LEAST_ROWS * self.c)))

    def _scattered(self, sums: Float64[Tensor, "m c p"]) -> Gradient:
        gradients = sums.new_zeros(len(sums), self.d)
        gradients[:, self.index.flatten()] = sums.flatten(1)
        return gradients

    def _errors(self, outputs: Tensor, batch: Any, dims: tuple[int, int | None]) -> tuple[Value, Tensor]:
        """Each model's summed loss, and the gradient of their total in the outputs, of the same shape."""

        def summed(output: Tensor, batch: Any) -> Tensor:
            return self.task.losses(output.reshape(-1, *self.shape), batch).sum()

        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            values = self._each(summed, leaf, batch, dims)
            [errors] = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), errors

    def _each(self, summed: Callable[..., Tensor], outputs: Tensor, batch: Any, dims: tuple[int, int | None]) -> Value:
        if self._vectorised:
            try:
                return vmap(summed, dims)(outputs, batch)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                self._vectorised = False
        own = [batch if dims[1] is None else indexed(batch, i) for i in range(outputs.shape[dims[0]])]
        return torch.stack([summed(output, one) for output, one in zip(outputs.unbind(dims[0]), own, strict=True)])


def linear_sums(general: ModelSums, memory: float) -> LinearSums | None:
    """The same sums by one matrix product for all parameter vectors, None where the model is not one linear layer.

    On every batch the calls that use the attributed parameters are recorded, and the output is compared with X Wᵀ + b
    at the model's parameters and at random ones, so the structure is found and never assumed.
    """
    task, model, names = general.task, general.model, general.names
    own = dict(model.named_parameters())
    sizes = {name: own[name].shape for name in names}
    generator = torch.Generator().manual_seed(0)
    other = {
        name: torch.randn(size, generator=generator, dtype=torch.float64).to(own[name].device)
        for name, size in sizes.items()
    }
    layer: Layer | None = None
    shape: torch.Size | None = None
    inputs: list[Tensor] = []
    targets: list[Any] = []
    used = 0
    with evaluation_mode(model):
        for name, parameter in own.items():
            parameter.requires_grad_(name in sizes)
        for _, batch in general.batches:
            recorder = Recorder({name: own[name] for name in names})
            with torch.enable_grad(), recorder:
                output = task.output(model, batch)
            found = _layer_of(recorder.recording, names)
            if found is None or not isinstance(output, Tensor) or output.shape[0] != rows_of(batch):
                return None
            if layer not in (None, found[0]) or shape not in (None, output.shape[1:]):
                return None
            layer, x = found
            shape = output.shape[1:]
            used += x.numel() * x.element_size()
            if used > memory or x.shape[0] != output.shape[0]:
                return None
            with torch.no_grad():
                moved = functional_call(_Output(task, model), {f"model.{k}": v for k, v in other.items()}, (batch,))
            current = {name: own[name].detach() for name in names}
            if not (_is_linear(output, x, layer, current) and _is_linear(moved, x, layer, other)):
                return None
            inputs.append(x)
            targets.append({"labels": batch_targets(batch)} if isinstance(task.loss, str) else batch)
    assert layer is not None
    assert shape is not None
    return LinearSums(task, layer, sizes, torch.cat(inputs), shape, _joined(targets))


class _Output(nn.Module):
    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Any) -> Any:
        return self.task.output(self.model, batch)


def _layer_of(recording: Recording, names: Sequence[str]) -> tuple[Layer, Float64[Tensor, "n p"]] | None:
    """The layer and its inputs where one matrix product, with or without a bias, is all that uses the parameters."""
    if recording.unknown or recording.used != set(names):
        return None
    products = [use for use in recording.uses if use.kind in ("linear", "matmul")]
    added = [use for use in recording.uses if use.kind == "trailing" and use.weight is None]
    if len(products) != 1 or len(products) + len(added) != len(recording.uses) or len(added) > 1:
        return None
    [use] = products
    biases = [piece for piece in (use.bias, *(one.bias for one in added)) if piece is not None]
    if use.weight is None or not use.weight.whole or len(biases) > 1 or not all(b.whole for b in biases):
        return None
    if use.inputs.ndim != 2 or use.inputs.dtype != torch.float64:
        return None
    bias = biases[0].name if biases else None
    return Layer(use.weight.name, bias, transposed=use.kind == "matmul"), use.inputs


def _is_linear(output: Any, x: Tensor, layer: Layer, parameters: dict[str, Tensor]) -> bool:
    weight = parameters[layer.weight]
    expected = x @ (weight if layer.transposed else weight.T)
    if layer.bias is not None:
        expected = expected + parameters[layer.bias]
    if not isinstance(output, Tensor) or output.shape[0] != x.shape[0] or output.numel() != expected.numel():
        return False
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return bool(torch.allclose(output.detach().reshape(expected.shape), expected, rtol=0, atol=EQUAL * scale))


def _joined(batches: Sequence[Any]) -> Any:
    """Batches one after the other."""
    leaves = [torch.cat(pieces) for pieces in zip(*map(tensors_of, batches), strict=True)]
    waiting = iter(leaves)
    return tree_map(lambda _: next(waiting), batches[0])
