"""The train examples as training reads them: any rows, in any order, as one batch."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

from refluence.batches import Batch, Batches, Data, rows_of, tensors_of, tree_map


class Examples:
    """A data set of which any rows can be asked for as a batch.

    The whole set is kept in memory as tensors (n, ...) where it is tensors, or fits and collates to one shape; else
    each batch is read when it is asked for.

    Args:
        data: as `Batches` takes it.
        device: where the batches are needed.

    Raises:
        DataError: data that `Batches` refuses.
    """

    def __init__(self, data: Data, device: torch.device | str | None = None) -> None:
        self._batches = Batches(data, device=device, name="train data")
        self.n = self._batches.n
        self.checksum = self._batches.checksum
        self.columns = _columns(data, self._batches, device)

    def batch(self, rows: Tensor) -> Batch:
        """The given rows (b,) as a batch; for rows (m, b), which only data in memory have, tensors (m, b, ...)."""
        if self.columns is None:
            return self._batches.select(rows.tolist())
        return tree_map(lambda column: _gathered(column, rows), self.columns)


def _gathered(column: Tensor, rows: Tensor) -> Tensor:
    return column.index_select(0, rows.flatten().to(column.device)).view(*rows.shape, *column.shape[1:])


def _columns(data: Data, batches: Batches, device: torch.device | str | None) -> Batch | None:
    """The whole set as one batch; None where that is more than a quarter of the memory, or no tensors of one shape."""
    first = batches.select(range(min(2, batches.n)))
    if not _only_tensors(first):
        return None
    size = sum(tensor.nbytes for tensor in tensors_of(first)) / rows_of(first) * batches.n
    if size > psutil.virtual_memory().available / 4:
        return None
    parts = [batch for _, batch in Batches(data, batch_size=batches.n, device=device, name="train data")]
    if len(parts) == 1:
        return parts[0]
    columns = list(zip(*map(tensors_of, parts), strict=True))
    if any(len({(part.dtype, part.shape[1:]) for part in column}) > 1 for column in columns):
        return None
    joined = iter([torch.cat(column) for column in columns])
    return tree_map(lambda _: next(joined), parts[0])


def _only_tensors(batch: Batch) -> bool:
    others: list[object] = []

    def visit(item: Batch) -> None:
        if isinstance(item, dict):
            item = list(item.values())
        if isinstance(item, (tuple, list)):
            for part in item:
                visit(part)
        elif not isinstance(item, Tensor):
            others.append(item)

    visit(tree_map(lambda tensor: tensor, batch))
    return not others
