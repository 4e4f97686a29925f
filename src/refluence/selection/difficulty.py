"""How hard examples are early in training: EL2N and GraNd, means over an ensemble of models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float64
from torch import Tensor, nn

from refluence.batches import Batches, Data
from refluence.errors import DataError, TaskError
from refluence.influence import Influence
from refluence.isolation import evaluation_mode
from refluence.progress import track
from refluence.solvers import Identity
from refluence.task import Task, batch_targets

Model = nn.Module | Mapping[str, Tensor]
Score = Callable[[nn.Module], Tensor]


def el2n(task: Task, data: Data, models: Iterable[Model], *, progress: bool = True) -> Float64[Tensor, " n"]:
    """EL2N_i = mean over models of ‖softmax f(x_i) − e_{y_i}‖₂.

    Args:
        task: of a classifier with loss "cross_entropy"; its forward pass is used.
        data: the examples.
        models: after a few epochs each; modules, or state dicts of the task's model.

    Raises:
        TaskError: another loss, or outputs that are not one value a class.
        DataError: no models.

    Source: Paul, Ganguli & Dziugaite 2021 (arXiv 2107.07075), Definition 2.2.
    """
    if task.loss != "cross_entropy":
        raise TaskError(f'EL2N is of classifiers with loss "cross_entropy", not {task.describe()["loss"]!r}')
    return _mean(models, lambda model: _errors(replace(task, model=model), data), task, "EL2N", progress)


def grand(task: Task, data: Data, models: Iterable[Model], *, progress: bool = True) -> Float64[Tensor, " n"]:
    """GraNd_i = mean over models of ‖∇θ ℓ_i‖₂, over the task's parameters.

    Args and errors are those of `el2n`, for any loss.

    Source: Paul, Ganguli & Dziugaite 2021 (arXiv 2107.07075), Definition 2.1.
    """

    def norms(model: nn.Module) -> Float64[Tensor, " n"]:
        influence = Influence(replace(task, model=model, measurement=None), solver=Identity(), progress=False)
        return influence.fit(data).self_influence().double().cpu().sqrt()

    return _mean(models, norms, task, "GraNd", progress)


def _errors(task: Task, data: Data) -> Float64[Tensor, " n"]:
    parts = []
    device = next(task.model.parameters()).device
    with evaluation_mode(task.model), torch.no_grad():
        for _, batch in Batches(data, device=device, name="data"):
            output, targets = task.output(task.model, batch), batch_targets(batch)
            if not isinstance(output, Tensor) or output.ndim != 2 or targets.shape != output.shape[:1]:
                raise TaskError("EL2N needs outputs (batch, classes) and one integer target for each example")
            errors = output.double().softmax(dim=1) - F.one_hot(targets.long(), output.shape[1])
            parts.append(errors.norm(dim=1).cpu())
    return torch.cat(parts)


def _mean(models: Iterable[Model], score: Score, task: Task, name: str, progress: bool) -> Float64[Tensor, " n"]:
    total, count = torch.zeros((), dtype=torch.float64), 0
    for model in track(_modules(models, task), name, enabled=progress):
        total = total + score(model)
        count += 1
    if count == 0:
        raise DataError(f"{name} is a mean over models, and there are none: give at least one")
    return total / count


def _modules(models: Iterable[Model], task: Task) -> Iterator[nn.Module]:
    for model in models:
        if isinstance(model, nn.Module):
            yield model
        else:
            own = copy.deepcopy(task.model)
            own.load_state_dict(dict(model))
            yield own
