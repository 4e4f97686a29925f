"""A matrix of examples, wherever it lies, read in order by stretches of rows in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.errors import DataError, NonFiniteError
from refluence.leverage.tables import Table, open_table

STRETCH = 1 << 22
"""Entries read at a time, at least."""
ROWS_PER_COLUMN = 8
"""Rows read at a time for each column, at least: what triangularising a stretch adds is then an eighth."""
TABLES = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv"}


class FeatureMatrix:
    """n examples of d features; `chunks` gives (first row, float64 rows) in order, as often as wanted.

    Args:
        source: a tensor, a NumPy array (memory-mapped too), a zarr array, a pandas DataFrame, or the path of a .npy
            file (memory-mapped), a zarr array, a parquet or a CSV file.
        columns: of a table, the names of the features; None: all of it.
        name: what error messages call it.

    Raises:
        DataError: a missing file, an unknown kind or column, not two-dimensional, empty, no real numbers.
    """

    def __init__(self, source: Any, columns: Sequence[str] | None = None, name: str = "X") -> None:
        self.name = name
        content = open_source(source, columns, name)
        if not isinstance(content, Table):
            _check(content, name)
        self._content = content
        self.n, self.d = (int(size) for size in content.shape)
        self.in_memory = isinstance(content, Tensor) or (
            isinstance(content, np.ndarray) and not isinstance(content, np.memmap)
        )
        self.device = content.device if isinstance(content, Tensor) else torch.device("cpu")
        self.precision = _precision(content.dtype)

    @property
    def stretch(self) -> int:
        """Rows that `chunks` reads at a time."""
        return max(1, ROWS_PER_COLUMN * self.d, STRETCH // self.d)

    def chunks(self, check: bool = True) -> Iterator[tuple[int, Float64[Tensor, "c d"]]]:
        """(first row, rows); further passes need no `check`.

        Raises:
            NonFiniteError: NaN or Inf, with its row and column.
        """
        start = 0
        stretches = self._stretches()
        for rows in stretches if self.in_memory else read_ahead(stretches):
            if check and not bool(torch.isfinite(rows.sum())):
                self._refuse_non_finite(rows, start)
            yield start, rows
            start += rows.shape[0]
        if start != self.n:
            raise DataError(f"{self.name} gave {start:,} rows where {self.n:,} were expected: it changed while read")

    def dense(self) -> Float64[Tensor, "n d"]:
        """All of it."""
        return torch.cat([rows for _, rows in self.chunks()])

    def _stretches(self) -> Iterator[Tensor]:
        content = self._content
        if isinstance(content, Table):
            yield from content.stretches(self.stretch)
            return
        for start in range(0, self.n, self.stretch):
            part = content[start : start + self.stretch]
            yield part.detach().double() if isinstance(part, Tensor) else _tensor(part)

    def _refuse_non_finite(self, rows: Tensor, start: int) -> None:
        wrong = (~torch.isfinite(rows)).nonzero()
        if not wrong.numel():
            return
        row, column = (int(index) for index in wrong[0])
        named = f" ({self._content.names[column]!r})" if isinstance(self._content, Table) else ""
        value = float(rows[row, column])
        raise NonFiniteError(
            f"{self.name} is {value} in row {start + row}, column {column}{named}: leave the row out, or fill it in",
            start + row,
            f"{value} in column {column}{named}",
        )


def read_ahead(stretches: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same, each read while the one before is worked on."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, stretches, None)
        while (rows := coming.result()) is not None:
            coming = reader.submit(next, stretches, None)
            yield rows


def open_source(source: Any, columns: Sequence[str] | None, name: str) -> Any:
    """A tensor, an array that can be sliced, or a `Table`.

    Raises:
        DataError: a missing file, an unknown kind or column.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.exists():
            raise DataError(f"{name}: there is no file {path}")
        if path.suffix in TABLES:
            return open_table(path, TABLES[path.suffix], columns)
        _refuse_columns(columns, f"the file {path.name}")
        return _open_array(path)
    if hasattr(source, "iloc") and hasattr(source, "columns"):
        return _of_frame(source, columns, name)
    _refuse_columns(columns, f"a {type(source).__name__}")
    if isinstance(source, (Tensor, np.ndarray)) or (hasattr(source, "shape") and hasattr(source, "dtype")):
        return source
    raise DataError(
        f"{name} must be a tensor, an array, a DataFrame, or the path of a .npy, .zarr, .parquet or .csv file, not "
        f"{type(source).__name__}"
    )


def _open_array(path: Path) -> Any:
    if path.suffix == ".npy":
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise DataError(f"{path} cannot be read as a .npy array: {error}") from error
    if path.is_dir():
        import zarr

        try:
            content = zarr.open(str(path), mode="r")
        except Exception as error:
            raise DataError(f"{path} cannot be read as a zarr array: {error}") from error
        if isinstance(content, zarr.Array):
            return content
        raise DataError(f"{path} is a zarr group with the arrays {sorted(content)}: give the path of one of them")
    raise DataError(f"{path} has the ending {path.suffix!r}: give a .npy, .zarr, .parquet or .csv file")


def _of_frame(frame: Any, columns: Sequence[str] | None, name: str) -> Any:
    names = list(frame.columns) if columns is None else list(columns)
    if missing := [column for column in names if column not in frame.columns]:
        raise DataError(f"{name} has no column {missing[0]!r}: it has {list(frame.columns)[:20]}")
    for column in names:
        if frame[column].dtype.kind not in "fiub":
            raise DataError(
                f"column {column!r} of {name} holds {frame[column].dtype}, no numbers: choose with columns="
            )
    return frame[names].to_numpy(dtype=np.float64)


def _refuse_columns(columns: Sequence[str] | None, what: str) -> None:
    if columns is not None:
        raise DataError(f"columns={list(columns)} is for tables (parquet, CSV, DataFrame); {what} has no named columns")


def _check(content: Any, name: str) -> None:
    shape = tuple(content.shape)
    if len(shape) != 2:
        raise DataError(f"{name} must be a matrix (n examples, d features), not of shape {shape}: flatten it first")
    if 0 in shape:
        raise DataError(f"{name} is empty, its shape is {shape}: give at least one example and one feature")
    kinds = content.is_complex() if isinstance(content, Tensor) else np.dtype(content.dtype).kind not in "fiub"
    if kinds:
        raise DataError(f"{name} holds {content.dtype}, and leverage is for real numbers: convert it first")


def _precision(dtype: Any) -> float:
    """The spacing of the numbers at 1 as they are stored: 1.2e-7 of float32; of integers, none."""
    if isinstance(dtype, torch.dtype):
        return float(torch.finfo(dtype).eps) if dtype.is_floating_point else 0.0
    return float(np.finfo(dtype).eps) if np.dtype(dtype).kind == "f" else 0.0


def _tensor(part: Any) -> Tensor:
    array = np.asarray(part, dtype=np.float64)
    return torch.from_numpy(array if array.flags.writeable else array.copy())
