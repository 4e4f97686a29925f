"""What makes data unfit to be read in ordered batches with stable row ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from refluence.errors import DataError


def refuse_what_needs_loading(data: Any, name: str) -> None:
    """Refuse paths, tables and numpy arrays.

    Raises:
        DataError: with what to give instead.
    """
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


def are_columns(data: list) -> bool:
    """Whether a list holds columns; a list of samples is a data set."""
    return bool(data) and all(isinstance(item, Tensor) for item in data)


def checked_dataset(data: Any, name: str) -> Any:
    """The data set, which has a length and rows by index.

    Raises:
        DataError: it has not.
    """
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise DataError(
            f"the {name} ({type(data).__name__}) has no length or no rows by index, so its examples have no stable "
            "ids: give a map-style Dataset, a tuple of tensors, or an unshuffled DataLoader"
        )
    return data


def checked_loader(loader: DataLoader, name: str) -> DataLoader:
    """The loader, which gives every row of its data set once and in order.

    Raises:
        DataError: a shuffling loader, one without batches, or one that drops rows.
    """
    checked_dataset(loader.dataset, name)
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
