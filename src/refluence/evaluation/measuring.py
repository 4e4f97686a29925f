"""What many models of one architecture measure on the test examples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.func import functional_call, vmap

from refluence.batches import Batch, Batches, Data, tensors_of, tree_map
from refluence.errors import DataError, TaskError
from refluence.isolation import evaluation_mode
from refluence.progress import track
from refluence.task import ERRORS, MEASUREMENTS, Task

States = Mapping[str, Tensor]
MAX_CHUNK_ELEMENTS = 1 << 26


def measure(
    task: Task, states: States, test: Data, *, batch_size: int | None = None, progress: bool = False
) -> dict[str, Float64[Tensor, "m k"]]:
    """The measurements of m models on k test examples, in eval mode, lower is better.

    "loss" is the task's loss, "margin" −log p/(1−p) of the label and "error" whether the prediction is wrong where the
    loss is a classifier's, "measurement" the task's own where it has one. A forward pass runs in the dtype of the
    states; the built-in losses of its output are taken in float64.

    Args:
        task: the model whose parameters are replaced, and the loss.
        states: parameter or buffer name → (m, ...); what is not named is the task model's.
        test: the test examples, as `Influence.score` takes them.
        batch_size: test examples a pass; None: the default of `Batches`.
        progress: show how far it is.

    Raises:
        DataError: no states, or states of different numbers of models.
        TaskError: a name that the model does not have.
    """
    count = _models_of(task, states)
    device, dtype = _kind_of(task, states)
    measurements = measurement_functions(task)
    found: list[dict[str, Tensor]] = []
    with evaluation_mode(task.model), torch.no_grad():
        fixed = _fixed(task, states, dtype)
        given = {name: tensor.to(device) for name, tensor in states.items()}
        batches = Batches(test, batch_size, device=device, dtype=dtype, name="test data")
        for _, batch in track(batches, "measuring", total=len(batches), enabled=progress):
            found.append(_measured(task, measurements, given, fixed, batch, count))
    return {name: torch.cat([part[name] for part in found], dim=1).cpu() for name in measurements}


def measurement_functions(task: Task) -> dict[str, Callable[[object, Batch], Tensor]]:
    """Name → f(output, batch) of what is measured for a task."""
    functions: dict[str, Callable[[object, Batch], Tensor]] = {"loss": task.losses}
    if isinstance(task.loss, str) and (task.loss, "margin") in MEASUREMENTS:
        functions["margin"] = MEASUREMENTS[task.loss, "margin"]
        functions["error"] = ERRORS[task.loss]
    if task.measurement not in (None, "loss"):
        functions["measurement"] = task.measurements
    return functions


def _measured(
    task: Task,
    measurements: Mapping[str, Callable[[object, Batch], Tensor]],
    states: States,
    fixed: States,
    batch: Batch,
    count: int,
) -> dict[str, Float64[Tensor, "m b"]]:
    model = _Output(task)
    names = {name: f"model.{name}" for name in [*states, *fixed]}
    widen = isinstance(task.loss, str)

    def values(state: States) -> dict[str, Tensor]:
        chosen = {names[name]: tensor for name, tensor in [*fixed.items(), *state.items()]}
        output = functional_call(model, chosen, (batch,))
        if widen:
            output = tree_map(_to_double, output)
        return {name: function(output, batch).double() for name, function in measurements.items()}

    if not _has_convolutions(task.model):
        largest = max(
            sum(tensor[0].numel() for tensor in states.values()), *(tensor.numel() for tensor in tensors_of(batch))
        )
        chunk = min(count, max(1, MAX_CHUNK_ELEMENTS // largest))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                return vmap(values, chunk_size=chunk)(dict(states))
        except (RuntimeError, ValueError, TypeError):
            pass  # what vmap cannot follow is measured model by model, where a real error comes up again
    singles = [values({name: tensor[i] for name, tensor in states.items()}) for i in range(count)]
    return {name: torch.stack([single[name] for single in singles]) for name in measurements}


class _Output(nn.Module):
    """The task's forward pass as a module, so that `functional_call` can put other parameters under it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._task = (task,)

    def forward(self, batch: Batch) -> object:
        return self._task[0].output(self.model, batch)


def _models_of(task: Task, states: States) -> int:
    known = {*dict(task.model.named_parameters(remove_duplicate=False)), *dict(task.model.named_buffers())}
    unknown = [name for name in states if name not in known]
    if unknown:
        raise TaskError(f"the states name {unknown[0]!r}, which the model ({type(task.model).__name__}) does not have")
    counts = {tensor.shape[0] if tensor.ndim else 0 for tensor in states.values()}
    if len(counts) != 1 or 0 in counts:
        shapes = {name: tuple(tensor.shape) for name, tensor in states.items()}
        raise DataError(f"states must all be (models, ...) with one number of models; shapes are {shapes}")
    return counts.pop()


def _kind_of(task: Task, states: States) -> tuple[torch.device, torch.dtype | None]:
    """The model's device, and the states' dtype where that is not the model's."""
    parameter = next(task.model.parameters())
    dtypes = {tensor.dtype for tensor in states.values() if tensor.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    return parameter.device, None if dtype == parameter.dtype else dtype


def _fixed(task: Task, states: States, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The model's own parameters and buffers that are in another dtype than the states."""
    own: Iterator[tuple[str, Tensor]] = iter([*task.model.named_parameters(), *task.model.named_buffers()])
    return {
        name: tensor.detach().to(dtype)
        for name, tensor in own
        if dtype is not None and name not in states and tensor.is_floating_point()
    }


def _to_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _has_convolutions(model: nn.Module) -> bool:
    """Convolutions of many models are grouped ones, which are slower than one model after the other on a CPU."""
    return any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())
