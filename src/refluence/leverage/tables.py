"""Columns of a parquet or CSV file, read in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refluence.errors import DataError


class Table:
    """Numeric columns of a file; `shape` is (rows, columns)."""

    dtype = np.dtype(np.float64)

    def __init__(self, content: Any, names: Sequence[str]) -> None:
        self._content, self.names = content, list(names)
        self.shape = (int(content.count_rows()), len(self.names))
        self.device = torch.device("cpu")

    def stretches(self, rows: int) -> Iterator[Tensor]:
        """Float64 rows in order, `rows` at a time and the rest; missing values are NaN."""
        waiting: list[np.ndarray] = []
        count = 0
        for batch in self._content.to_batches(columns=self.names, batch_size=rows):
            columns = [batch.column(name).cast("float64").to_numpy(zero_copy_only=False) for name in self.names]
            waiting.append(np.stack(columns, axis=1) if batch.num_rows else np.empty((0, len(columns))))
            count += batch.num_rows
            if count >= rows:
                yield torch.from_numpy(np.concatenate(waiting))
                waiting, count = [], 0
        if count:
            yield torch.from_numpy(np.concatenate(waiting))


def open_table(path: Path, kind: str, columns: Sequence[str] | None) -> Table:
    """The file's columns.

    Raises:
        DataError: a file of another format, an unknown column, one without numbers, no rows.
    """
    import pyarrow as pa
    from pyarrow import dataset

    try:
        content = dataset.dataset(path, format=kind)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as {kind}: {error}") from error
    schema = content.schema
    names = list(schema.names) if columns is None else list(columns)
    for name in names:
        if name not in schema.names:
            raise DataError(f"{path} has no column {name!r}: it has {schema.names[:20]}")
        kinds = schema.field(name).type
        if not (pa.types.is_integer(kinds) or pa.types.is_floating(kinds) or pa.types.is_boolean(kinds)):
            raise DataError(f"column {name!r} of {path} holds {kinds}, no numbers: choose others with columns=")
    table = Table(content, names)
    if 0 in table.shape:
        raise DataError(f"{path} is empty: {table.shape[0]} rows of {table.shape[1]} columns")
    return table
