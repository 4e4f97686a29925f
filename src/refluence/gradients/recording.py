"""One forward and one backward pass that give the gradient of every recorded output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from refluence.batches import rows_of, slice_rows
from refluence.errors import NonFiniteError, RefluenceError, TaskError
from refluence.gradients.functional import Objective
from refluence.gradients.recorder import Recorder, Recording


def record(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], objective: Objective, batch: Any, start: int, data: str
) -> tuple[Recording, list[list[Tensor]]]:
    """(how the parameters were used, for each column of the objective its gradients in each use's output).

    The objective gives one value an example, or q of them as (n, q): one forward pass and q backward passes.

    Raises:
        NonFiniteError: NaN or Inf in a value, with its row, counted from `start` of `data`.
        TaskError: not one value for each example.
    """
    recorder = Recorder(parameters)
    try:
        with recorder:
            values = objective(model, batch)
    except Exception as failure:
        note_rows(failure, batch, start, data, lambda part: objective(model, part))
        raise
    _check_finite(values, start, data)
    _check_rows(values, batch)
    recording = recorder.recording
    edges = [use.edge for use in recording.uses if use.edge is not None]
    unseen = [name for name in parameters if name not in recording.used]
    sought: list[Any] = [*edges, *(parameters[name] for name in unseen)]
    columns = []
    for column in values.unbind(1) if values.ndim == 2 else (values,):
        found: Iterator[Tensor | None] = iter(())
        if sought and values.requires_grad:
            keep = values.ndim == 2
            found = iter(torch.autograd.grad(column.sum(), sought, retain_graph=keep, allow_unused=True))
        errors = []
        for use in recording.uses:
            error = next(found, None) if use.edge is not None else None
            errors.append(values.new_zeros(()).expand(use.output_shape) if error is None else error.detach())
        columns.append(errors)
        # What autograd reaches and no torch function showed: a custom autograd function, an extension's kernel.
        recording.unknown |= {name for name, gradient in zip(unseen, found, strict=False) if gradient is not None}
    return recording, columns


def note_rows(error: Exception, batch: Any, start: int, data: str, values: Callable[[Any], Any]) -> None:
    """Add to an error of the model or the loss on which row it arose, or which rows, and the usual causes.

    Args:
        values: what raised it, of the batch.
    """
    if isinstance(error, (RefluenceError, MemoryError, torch.OutOfMemoryError)):
        return
    n = rows_of(batch)
    alone = [i for i in range(n) if _raises(values, slice_rows(batch, i, i + 1))]
    where = f"row {start + alone[0]}" if 0 < len(alone) < n else f"rows {start} to {start + n - 1}"
    error.add_note(
        f"raised by the model or the loss on {data} {where}. The usual causes: a "
        "label outside the model's classes; inputs of another dtype or width than the model's; a dict batch that "
        "model(**batch without labels) does not take (give forward=); a `loss` that does not take (output, batch), as "
        'nn.CrossEntropyLoss() does not (use loss="cross_entropy")'
    )


def _raises(values: Callable[[Any], Any], batch: Any) -> bool:
    try:
        with torch.no_grad():
            values(batch)
    except Exception:
        return True
    return False


def _check_finite(values: Tensor, start: int, data: str) -> None:
    if not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values)).nonzero()[0, 0])
        raise NonFiniteError(
            f"the loss of {data} row {start + row} is {values[row].tolist()}: look at that example's input and target, "
            "or leave it out",
            start + row,
            f"the loss is {values[row].tolist()}",
        )


def _check_rows(values: Tensor, batch: Any) -> None:
    if values.shape[0] != rows_of(batch):
        raise TaskError(
            f"the loss gave {values.shape[0]} values for a batch of {rows_of(batch)} examples: an example is a row of "
            "the data set; average over an example's own tokens or outputs"
        )
