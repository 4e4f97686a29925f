"""Ordered batches of a data set with stable row ids."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from refluence.errors import DataError

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
        _refuse_what_needs_loading(data, name)
        self.name = name
        self.batch_size = batch_size or DEFAULT_BATCH_SIZE
        self.device, self.dtype = device, dtype
        self._checksum: tuple[str, str] | None = None
        self._tensors: Batch | None = None
        self._loader: DataLoader | None = None
        self._function: Callable[[int, Batch], Batch] | None = None
        self._chosen: list[int] | None = None
        if isinstance(data, DataLoader):
            self._loader = _checked_loader(data, name)
            self.batch_size = data.batch_size or self.batch_size
            self.n = len(data.dataset)  # type: ignore[arg-type]
        elif type(data) is TensorDataset:  # a subclass may transform its rows
            self._tensors, self.n = data.tensors, len(data)
        elif isinstance(data, (Tensor, tuple, Mapping)) or (isinstance(data, list) and _are_columns(data)):
            self._tensors = (data,) if isinstance(data, Tensor) else data
            self.n = rows_of(self._tensors)
        else:
            self._loader = DataLoader(_checked_dataset(data, name), batch_size=self.batch_size, shuffle=False)
            self.n = len(data)
        if self.n == 0:
            raise DataError(f"the {name} is empty: give at least one example")
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

    def mapped(self, function: Callable[[int, Batch], Batch]) -> Batches:
        """The same batches, each given by `function(first row, batch)` when it is reached."""
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
            return self._placed(tree_map(lambda tensor: tensor[index.to(tensor.device)], self._tensors))
        assert self._loader is not None
        collate = self._loader.collate_fn or default_collate
        return self._placed(collate([self._loader.dataset[row] for row in rows]))

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
                yield slice_rows(self._tensors, index * size, (index + 1) * size)
            return
        assert loader is not None
        if self._chosen is not None:
            rows = [list(range(index * size, min((index + 1) * size, self.n))) for index in self._chosen]
            loader = DataLoader(
                loader.dataset, batch_sampler=rows, collate_fn=loader.collate_fn, num_workers=loader.num_workers
            )
        yield from _started(loader)

    def _given(self, start: int, batch: Batch) -> Batch:
        placed = self._placed(batch)
        return placed if self._function is None else self._function(start, placed)

    def _placed(self, batch: Batch) -> Batch:
        def place(tensor: Tensor) -> Tensor:
            dtype = self.dtype if tensor.is_floating_point() else None
            return tensor.to(device=self.device, dtype=dtype)

        return batch if self.device is None and self.dtype is None else tree_map(place, batch)

    def _check_stable(self) -> None:
        """Read a few rows twice, because gradients that fit the memory are made in one pass only."""
        rows = sorted({*range(min(STABLE_ROWS, self.n)), *range(max(0, self.n - STABLE_ROWS), self.n)})
        with torch.random.fork_rng(devices=[]):
            first, second = (_hash(self.select(rows)) for _ in range(2))
        if first != second:
            raise DataError(
                f"rows of the {self.name} differ between two readings: turn off random augmentation, or store the "
                "transformed rows once"
            )

    def _compare(self, checksum: tuple[str, str]) -> None:
        if self._checksum is None:
            self._checksum = checksum
        elif checksum != self._checksum:
            which = "first" if checksum[0] != self._checksum[0] else "last"
            raise DataError(
                f"the rows of the {self.name} changed between two passes (the {which} batch differs): "
                "turn off random augmentation and shuffling, or store the transformed rows once"
            )


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


def _refuse_what_needs_loading(data: Any, name: str) -> None:
    if isinstance(data, (str, bytes, Path)):
        raise DataError(f"the {name} is {data!r}, a {type(data).__name__}: load it, and give a tuple of tensors")
    if hasattr(data, "iloc"):
        raise DataError(
            f"the {name} is a {type(data).__name__}: give a tuple of tensors, such as "
            "(torch.tensor(df[features].values), torch.tensor(df[target].values))"
        )
    parts = list(data.values()) if isinstance(data, Mapping) else data if isinstance(data, (tuple, list)) else [data]
    if any(isinstance(part, np.ndarray) for part in parts):
        raise DataError(f"the {name} holds numpy arrays: give tensors, torch.from_numpy(array)")


def _are_columns(data: list) -> bool:
    """Whether a list holds columns; a list of samples is a data set."""
    return bool(data) and all(isinstance(item, Tensor) for item in data)


def _checked_dataset(data: Any, name: str) -> Any:
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise DataError(
            f"the {name} ({type(data).__name__}) has no length or no rows by index, so its examples have no stable "
            "ids: give a map-style Dataset, a tuple of tensors, or an unshuffled DataLoader"
        )
    return data


def _checked_loader(loader: DataLoader, name: str) -> DataLoader:
    _checked_dataset(loader.dataset, name)
    batch_sampler = loader.batch_sampler
    if batch_sampler is None:
        raise DataError(f"the {name} loader has batch_size=None, so its batches are single examples: give a batch size")
    sampler = getattr(batch_sampler, "sampler", loader.sampler)
    if type(sampler) is not SequentialSampler or type(batch_sampler) is not BatchSampler:
        culprit = type(sampler if type(sampler) is not SequentialSampler else batch_sampler).__name__
        raise DataError(
            f"the {name} loader draws its rows with {culprit}, so row ids would not be those of the data set: "
            "use DataLoader(dataset, shuffle=False)"
        )
    if getattr(batch_sampler, "drop_last", loader.drop_last):
        raise DataError(f"the {name} loader has drop_last=True, which loses examples: use drop_last=False")
    return loader
