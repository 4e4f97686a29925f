"""Which test rows are explained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import typer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from refluence.batches import Batches, tree_map
from refluence.isolation import evaluation_mode
from refluence.task import Task, batch_targets

_HINT = "--test-rows"


def parse_rows(text: str, total: int, errors: Callable[[], list[int]]) -> list[int]:
    """The rows that `text` names, each once, in the order given.

    Args:
        text: rows (`3`), ranges as in Python (`0:12`, `:5`, `-3:`), `errors` and `all`, separated by commas.
        total: the number of test rows.
        errors: gives the misclassified rows.

    Raises:
        typer.BadParameter: not understood, out of range, or nothing is left.
    """
    rows: dict[int, None] = {}
    for term in (term.strip() for term in text.split(",")):
        rows.update(dict.fromkeys(_term(term, total, errors)))
    if not rows:
        raise typer.BadParameter(f"{text!r} selects none of the {total:,} test rows", param_hint=_HINT)
    return list(rows)


def _term(term: str, total: int, errors: Callable[[], list[int]]) -> Iterable[int]:
    if term == "all":
        return range(total)
    if term == "errors":
        return errors()
    try:
        parts = [int(part) if part.strip() else None for part in term.split(":")]
        if len(parts) in (2, 3):
            return range(total)[slice(*parts)]
        (row,) = parts
        assert row is not None
        return [range(total)[row]]
    except IndexError as error:
        raise typer.BadParameter(
            f"there is no test row {term}: the rows are 0 to {total - 1:,}", param_hint=_HINT
        ) from error
    except (ValueError, AssertionError) as error:
        raise typer.BadParameter(
            f"{term!r} is not understood: use rows such as 3,17,99, a range such as 0:12, errors or all",
            param_hint=_HINT,
        ) from error


def select_rows(data: Any, rows: list[int]) -> Any:
    """The given rows of a data set, in the given order, as data of the same kind."""
    if isinstance(data, DataLoader):
        return DataLoader(Subset(data.dataset, rows), batch_size=data.batch_size, collate_fn=data.collate_fn)
    if isinstance(data, Dataset) and not isinstance(data, TensorDataset):
        return Subset(data, rows)
    tensors = data.tensors if isinstance(data, TensorDataset) else data
    index = torch.as_tensor(rows)
    return tree_map(lambda tensor: tensor[index.to(tensor.device)], tensors)


def count_rows(data: Any) -> int:
    """The number of rows of a data set.

    Raises:
        DataError: it has none, or no stable ones.
    """
    return Batches(data, name="test data").n


@torch.no_grad()
def misclassified(task: Task, test: Any) -> list[int]:
    """The test rows whose class of highest output is not their label.

    Raises:
        typer.BadParameter: the model does not give one row of class outputs an example.
    """
    device = next(task.model.parameters()).device
    wrong: list[int] = []
    with evaluation_mode(task.model) as model:
        for start, batch in Batches(test, device=device, name="test data"):
            output, labels = task.output(model, batch), batch_targets(batch)
            if not _classifies(output, labels):
                raise typer.BadParameter(
                    "'errors' needs a classifier with outputs (batch, classes) and one integer label a row",
                    param_hint=_HINT,
                )
            wrong += (start + (output.argmax(1) != labels).nonzero().flatten()).tolist()
    return wrong


def _classifies(output: Any, labels: Any) -> bool:
    return (
        isinstance(output, Tensor)
        and isinstance(labels, Tensor)
        and output.ndim == 2
        and output.shape[1] > 1
        and labels.shape == output.shape[:1]
        and not labels.is_floating_point()
    )
