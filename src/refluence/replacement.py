"""Rows of a data set that are never read: another row stands for them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.utils.data import Dataset


class ReplacedRows(Dataset):
    """A data set in which some rows read as row `by`.

    Args:
        data: by index.
        rows: that are replaced.
        by: the row that is read for them.
    """

    def __init__(self, data: Any, rows: Collection[int], by: int) -> None:
        self.data, self.rows, self.by = data, frozenset(rows), by

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Any:
        return self.data[self.by if row in self.rows else row]
