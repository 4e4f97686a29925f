"""How well a classifier does on some data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refluence.batches import Batches, Data
from refluence.errors import TaskError
from refluence.isolation import evaluation_mode
from refluence.task import IGNORE_INDEX, Task, batch_targets


@dataclass(frozen=True)
class Fit:
    """The mean of the task's losses over the examples, and the share of their targets that are predicted right."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(task: Task, data: Data, *, batch_size: int = 64) -> Fit:
    """Mean loss and accuracy of a task's model, in eval mode, on some data.

    A target is predicted right where its class has the highest output (class last); an example may have several, as a
    sequence has. Targets of −100 are left out.

    Raises:
        TaskError: the model is no classifier, or no target is left.
    """
    device = next(task.model.parameters()).device
    loss, right, counted = 0.0, 0, 0
    batches = Batches(data, batch_size, device=device)
    with evaluation_mode(task.model) as model:
        for _, batch in batches:
            output, targets = task.output(model, batch), batch_targets(batch)
            if not isinstance(output, Tensor) or targets.is_floating_point() or output.shape[:-1] != targets.shape:
                raise TaskError("accuracy needs outputs of one value a class (last) and one integer target for each")
            counts = targets != IGNORE_INDEX
            loss += task.losses(output, batch).double().sum().item()
            right += int((output.argmax(dim=-1) == targets)[counts].sum())
            counted += int(counts.sum())
    if counted == 0:
        raise TaskError(f"no target is left to predict: all of them are {IGNORE_INDEX}")
    return Fit(loss / batches.n, right / counted)
