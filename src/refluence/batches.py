"""Ordered batches of a data set with stable row ids."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from refluence.data_checks import are_columns, checked_dataset, checked_loader, refuse_what_needs_loading
from refluence.errors import DataError
from refluence.replacement import ReplacedRows

DEFAULT_BATCH_SIZE = 256
STABLE_ROWS = 4

Data = Any
Batch = Any


def tree_map(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """`function` on every tensor of a nested tuple, list or mapping; other leaves pass through."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: tree_map(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(tree_map(function, value) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(tree_map(function, value) for value in batch)
    return batch


def tensors_of(batch: Batch) -> list[Tensor]:
    """Every tensor of a batch, in order."""
    found: list[Tensor] = []
    tree_map(lambda tensor: found.append(tensor) or tensor, batch)  # type: ignore[func-returns-value]
    return found


def rows_of(batch: Batch) -> int:
    """The number of examples of a batch.

    Raises:
        DataError: no tensor, or tensors that disagree about their first dimension.
    """
    tensors = tensors_of(batch)
    if not tensors:
        raise DataError(f"a batch of type {type(batch).__name__} holds no tensor: give tuples or dicts of tensors")
    if any(tensor.ndim == 0 for tensor in tensors) or len({tensor.shape[0] for tensor in tensors}) > 1:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise DataError(
            f"the tensors of a batch must have the examples in their first dimension, all as many; shapes are {shapes}"
        )
    return tensors[0].shape[0]


def slice_rows(batch: Batch, start: int, stop: int) -> Batch:
    """Rows [start, stop) of a batch."""
    return tree_map(lambda tensor: tensor[start:stop], batch)


class Batches:
    """A data set as ordered batches: iterating yields (first row, batch), always the same rows in the same order.

    Args:
        data: a `Dataset` with a length, a tensor, a tuple or mapping of tensors, or an unshuffled `DataLoader`.
        batch_size: rows a batch (a `DataLoader` keeps its own); default 256.
        device, dtype: where the batches go, and the floating-point type they are cast to; None leaves them.
        name: what error messages call the data.

    Attributes:
        n: rows.
        first, whole: place of the first row in the data set that this is a `stretch` of, and the length of that.

    Raises:
        DataError: a shuffling loader, data without a length, an empty set, or rows that change between two passes.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        name: str = "data",
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise DataError(f"batch_size must be at least 1, not {batch_size}")
        refuse_what_needs_loading(data, name)
        self.name = name
        self.first = 0
        self.batch_size = batch_size or DEFAULT_BATCH_SIZE
        self.device, self.dtype = device, dtype
        self._checksum: tuple[str, str] | None = None
        self._tensors: Batch | None = None
        self._loader: DataLoader | None = None
        self._function: Callable[[int, Batch], Batch] | None = None
        self._chosen: list[int] | None = None
        self._replaced: frozenset[int] = frozenset()  # by their place in the whole
        self._standing: Batch = None
        if isinstance(data, DataLoader):
            self._loader = checked_loader(data, name)
            self.batch_size = data.batch_size or self.batch_size
            self.n = len(data.dataset)  # type: ignore[arg-type]
        elif type(data) is TensorDataset:  # a subclass may transform its rows
            self._tensors, self.n = data.tensors, len(data)
        elif isinstance(data, (Tensor, tuple, Mapping)) or (isinstance(data, list) and are_columns(data)):
            self._tensors = (data,) if isinstance(data, Tensor) else data
            self.n = rows_of(self._tensors)
        else:
            self._loader = DataLoader(checked_dataset(data, name), batch_size=self.batch_size, shuffle=False)
            self.n = len(data)
        if self.n == 0:
            raise DataError(f"the {name} is empty: give at least one example")
        self.whole = self.n
        if self._loader is not None:
            self._check_stable()

    def __len__(self) -> int:
        """The number of batches."""
        return -(-self.n // self.batch_size) if self._chosen is None else len(self._chosen)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """(first row, batch) over the whole set, or over the batches that `holding` chose."""
        if self._chosen is not None:
            for index, batch in zip(self._chosen, self.raw(), strict=True):
                yield index * self.batch_size, self._given(index * self.batch_size, batch)
            return
        start, first, last = 0, "", ""
        for batch in self.raw():
            count = rows_of(batch)
            if start == 0:
                first = _hash(batch)
            if start + count >= self.n:
                last = _hash(batch)
            yield start, self._given(start, batch)
            start += count
        if start != self.n:
            raise DataError(f"the {self.name} gave {start} rows but its length is {self.n}: no rows may be dropped")
        self._compare((first, last))

    def stretch(self, first: int, stop: int) -> Batches:
        """Rows [first, stop) as a data set of their own, numbered from 0, in the batches of the whole.

        Its `first` and `whole` are the place of its first row in the whole data set, and the length of that.

        Raises:
            DataError: a first row at which no batch begins.
        """
        if first % self.batch_size or not 0 <= first < stop <= self.n:
            raise DataError(
                f"rows {first} to {stop} of {self.n} cannot be taken apart: begin at a multiple of {self.batch_size}"
            )
        other = copy.copy(self)
        if self._tensors is not None:
            other._tensors = slice_rows(self._tensors, first, stop)
        else:
            assert self._loader is not None
            loader = self._loader
            other._loader = DataLoader(
                Subset(loader.dataset, range(first, stop)),
                batch_size=self.batch_size,
                collate_fn=loader.collate_fn,
                num_workers=loader.num_workers,
            )
        other.first, other.whole, other.n = self.first + first, self.whole, stop - first
        other._checksum = None
        return other

    def replacing(self, rows: Collection[int], by: int) -> Batches:
        """The same batches, in which each of these rows reads as row `by`; they themselves are not read.

        Raises:
            DataError: rows that do not exist, or `by` among them.
        """
        replaced = {row - self.first for row in self._replaced} | {int(row) for row in rows}
        if by in replaced or any(not 0 <= row < self.n for row in (by, *rows)):
            raise DataError(f"row {by} cannot stand for rows {sorted(replaced)} of {self.n}: give another one of them")
        other = copy.copy(self)
        other._replaced = frozenset(self.first + row for row in replaced)
        if self._tensors is not None:
            other._standing = slice_rows(self._tensors, by, by + 1)
        else:
            assert self._loader is not None
            loader = self._loader
            other._loader = DataLoader(
                ReplacedRows(loader.dataset, replaced, by),
                batch_sampler=loader.batch_sampler,
                collate_fn=loader.collate_fn,
                num_workers=loader.num_workers,
            )
        other._checksum = None
        return other

    def of_size(self, batch_size: int) -> Batches:
        """The same rows in smaller batches."""
        other = copy.copy(self)
        other.batch_size, other._checksum = batch_size, None
        if self._loader is not None:
            other._loader = DataLoader(
                self._loader.dataset,
                batch_size=batch_size,
                collate_fn=self._loader.collate_fn,
                num_workers=self._loader.num_workers,
            )
        return other

    def mapped(self, function: Callable[[int, Batch], Batch]) -> Batches:
        """The same batches, each given by `function(first row in the whole, batch)` when it is reached."""
        other = copy.copy(self)
        other._function = function
        return other

    def holding(self, ranges: Sequence[tuple[int, int]]) -> Batches:
        """Only the batches, cut as always, that hold rows of any of the ranges [start, stop)."""
        other, size = copy.copy(self), self.batch_size
        other._chosen = sorted({i for start, stop in ranges for i in range(start // size, -(-stop // size))})
        return other

    def select(self, rows: Sequence[int]) -> Batch:
        """One batch of the given rows, in the given order."""
        rows = [int(row) for row in rows]
        if self._tensors is not None:
            index = torch.as_tensor(rows)
            batch = tree_map(lambda tensor: tensor[index.to(tensor.device)], self._tensors)
            return self._placed(self._without_replaced(batch, rows))
        assert self._loader is not None
        collate = self._loader.collate_fn or default_collate
        try:
            samples = [self._loader.dataset[row] for row in rows]
        except Exception as error:
            self._note_row(error, rows)
            raise
        return self._placed(collate(samples))

    @property
    def checksum(self) -> str:
        """A checksum of the length and of the first and last rows; the same for every batch size."""
        size = min(32, self.n)
        ends = (self.select(range(size)), self.select(range(self.n - size, self.n)))
        return hashlib.sha256(":".join([str(self.n), *map(_hash, ends)]).encode()).hexdigest()

    def raw(self) -> Iterator[Batch]:
        """The batches as they are read, before they are cast or moved."""
        size, loader = self.batch_size, self._loader
        if self._tensors is not None:
            for index in range(-(-self.n // size)) if self._chosen is None else self._chosen:
                start, stop = index * size, min((index + 1) * size, self.n)
                yield self._without_replaced(slice_rows(self._tensors, start, stop), range(start, stop))
            return
        assert loader is not None
        order: Sequence[int] = range(self.n)
        if self._chosen is not None:
            rows = [list(range(index * size, min((index + 1) * size, self.n))) for index in self._chosen]
            order = [row for batch in rows for row in batch]
            loader = DataLoader(
                loader.dataset, batch_sampler=rows, collate_fn=loader.collate_fn, num_workers=loader.num_workers
            )
        waiting, read = _started(loader), 0
        while True:
            try:
                batch = next(waiting)
            except StopIteration:
                return
            except Exception as error:
                self._note_row(error, order[read : read + (getattr(loader.batch_sampler, "batch_size", None) or size)])
                raise
            read += rows_of(batch)
            yield batch

    def _without_replaced(self, batch: Batch, rows: Sequence[int]) -> Batch:
        """A batch of these rows of the tensors, in which the row that stands for others is put where they were."""
        at = [i for i, row in enumerate(rows) if self.first + row in self._replaced] if self._replaced else []
        if not at:
            return batch
        values = iter(tensors_of(self._standing))
        return tree_map(lambda tensor: _filled(tensor, at, next(values)), batch)

    def _given(self, start: int, batch: Batch) -> Batch:
        placed = self._placed(batch)
        return placed if self._function is None else self._function(self.first + start, placed)

    def _placed(self, batch: Batch) -> Batch:
        def place(tensor: Tensor) -> Tensor:
            dtype = self.dtype if tensor.is_floating_point() else None
            return tensor.to(device=self.device, dtype=dtype)

        return batch if self.device is None and self.dtype is None else tree_map(place, batch)

    def _check_stable(self) -> None:
        """Read a few rows twice, because gradients that fit the memory are made in one pass only."""
        rows = sorted({*range(min(STABLE_ROWS, self.n)), *range(max(0, self.n - STABLE_ROWS), self.n)})
        with torch.random.fork_rng(devices=[]):
            try:
                first, second = (_hash(self.select(rows)) for _ in range(2))
            except Exception:
                # A row that cannot be read is named, or left out, where the rows are put to use.
                readable = [row for row in rows if self._readable(row)]
                if len(readable) == len(rows):
                    raise
                first, second = (_hash(self.select(readable)) if readable else "" for _ in range(2))
        if first != second:
            raise DataError(
                f"rows of the {self.name} differ between two readings: turn off random augmentation, or store the "
                "transformed rows once"
            )

    def _note_row(self, error: Exception, rows: Sequence[int]) -> None:
        """Add to an error of the data set which of these rows it is about, where one of them cannot be read."""
        row = next((row for row in rows if not self._readable(row)), None)
        if row is not None:
            error.add_note(f"raised by reading {self.name} row {self.first + row}")

    def _readable(self, row: int) -> bool:
        assert self._loader is not None
        try:
            self._loader.dataset[row]
        except Exception:
            return False
        return True

    def _compare(self, checksum: tuple[str, str]) -> None:
        if self._checksum is None:
            self._checksum = checksum
        elif checksum != self._checksum:
            which = "first" if checksum[0] != self._checksum[0] else "last"
            raise DataError(
                f"the rows of the {self.name} changed between two passes (the {which} batch differs): "
                "turn off random augmentation and shuffling, or store the transformed rows once"
            )


def _filled(tensor: Tensor, at: Sequence[int], row: Tensor) -> Tensor:
    """The tensor with `row` (1, ...) in these places."""
    out = tensor.clone()
    out[at] = row.to(out.device)
    return out


def _started(loader: DataLoader) -> Iterator[Batch]:
    """An iterator over a loader, which draws a seed at its start; the random states are left as they were."""
    own = loader.generator
    state = None if own is None else own.get_state()
    with torch.random.fork_rng(devices=[]):
        batches = iter(loader)
    if own is not None:
        own.set_state(state)
    return batches


def _hash(batch: Batch) -> str:
    digest = hashlib.sha256()
    for tensor in tensors_of(batch):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous()
        digest.update(values.view(torch.uint8).numpy().tobytes() if values.numel() else b"")
    return digest.hexdigest()
