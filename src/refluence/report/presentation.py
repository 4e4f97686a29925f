"""Rows of the user's data as something to look at: a picture, a text, or a row of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from refluence.errors import DataError
from refluence.report.formatting import number, shorten
from refluence.report.pictures import Picture, PixelScale, encode, image_shape, pixels

Sample = Any
Kind = Literal["image", "text", "table"]
Names = Sequence[str] | NDArray[Any]

MAX_TEXT = 1200
MAX_NAME = 60
MAX_CELLS = 12
MAX_TOKENS = 200
INPUT_KEYS = ("pixel_values", "input_ids", "inputs", "input", "image", "images", "text", "features", "x")


@dataclass(frozen=True)
class Presentation:
    """How rows of the data are shown in the report.

    A *sample* is one row of a batch: what the data set gives for it, as a tuple or mapping of tensors.

    Args:
        kind: "image", "text", "table", or "auto" to tell from the inputs' type and shape.
        class_names: names of the classes, in the order of the outputs.
        image: `f(sample) -> uint8 array H×W or H×W×3`; default: the input, de-normalised or scaled to its range.
        text: `f(sample) -> str`, for token ids to text; default: a string input as it is, token ids as numbers.
        feature_names: names of a table's columns.
        mean, std: what the pictures were normalised with, one value or one a channel.

    Raises:
        DataError: an unknown kind.
    """

    kind: str = "auto"
    class_names: Names | None = None
    image: Callable[[Sample], NDArray[np.uint8]] | None = None
    text: Callable[[Sample], str] | None = None
    feature_names: Names | None = None
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("auto", *get_args(Kind)):
            known = ", ".join(("auto", *get_args(Kind)))
            raise DataError(f"unknown kind of presentation {self.kind!r}: use one of {known}")

    def kind_of(self, sample: Sample) -> Kind:
        """The kind in which a sample is shown."""
        for kind in get_args(Kind):
            if self.kind == kind:
                return kind
        if self.image is not None:
            return "image"
        if self.text is not None:
            return "text"
        if self.feature_names is not None:
            return "table"
        return guess_kind(sample)

    def class_name(self, index: int) -> str:
        """The name of a class; its number where it has none."""
        names = self.class_names
        if names is not None and 0 <= index < len(names):
            return shorten(str(names[index]), MAX_NAME)
        return str(index)


@dataclass(frozen=True)
class View:
    """One row of the data as it is shown; exactly one of `picture`, `text`, `cells` is filled."""

    kind: Kind
    picture: Picture | None = None
    text: str = ""
    cells: tuple[str, ...] = ()


def row_of(batch: Any, row: int) -> Sample:
    """Row `row` of a batch, with the batch's structure; texts in lists are rows too."""
    if isinstance(batch, Tensor):
        return batch[row]
    if isinstance(batch, Mapping):
        return {key: row_of(value, row) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)) and batch and all(isinstance(value, str) for value in batch):
        return batch[row]
    if isinstance(batch, (list, tuple)):
        return tuple(row_of(value, row) for value in batch)
    return batch


def primary_input(sample: Sample) -> Any:
    """The part of a sample that is looked at: its first element, or the entry of a mapping with an input's name."""
    if isinstance(sample, Mapping):
        keys = [key for key in INPUT_KEYS if key in sample] or [key for key in sample if key != "labels"]
        return sample[keys[0]] if keys else None
    if isinstance(sample, tuple):
        return primary_input(sample[0]) if sample else None
    return sample


def guess_kind(sample: Sample) -> Kind:
    """Pictures by shape, texts by type (strings, sequences of integers), else a row of a table."""
    value = primary_input(sample)
    if isinstance(value, str):
        return "text"
    if not isinstance(value, Tensor):
        return "table"
    floating = value.is_floating_point()
    byte = value.element_size() == 1 and not floating
    if value.ndim == 1 and not floating and value.numel() > 1:
        return "text"
    if (floating or byte) and image_shape(tuple(value.shape), floating):
        return "image"
    return "table"


def views(samples: Sequence[Sample], presentation: Presentation) -> list[View]:
    """What is shown for each sample; pictures share one scale."""
    if not samples:
        return []
    kind = presentation.kind_of(samples[0])
    if kind == "image":
        return [View(kind, picture=picture) for picture in _pictures(samples, presentation)]
    if kind == "text":
        return [View(kind, text=_text(sample, presentation)) for sample in samples]
    return [View(kind, cells=_cells(sample)) for sample in samples]


def column_names(samples: Sequence[Sample], presentation: Presentation) -> tuple[tuple[str, ...], int]:
    """The columns of a table that are shown, and how many there are in all."""
    total = max((_numel(primary_input(sample)) for sample in samples), default=0)
    names = [] if presentation.feature_names is None else list(presentation.feature_names)
    shown = [shorten(str(names[i]), MAX_NAME) if i < len(names) else f"x{i}" for i in range(min(total, MAX_CELLS))]
    return tuple(shown), total


def _pictures(samples: Sequence[Sample], presentation: Presentation) -> list[Picture]:
    if presentation.image is not None:
        return [encode(np.asarray(presentation.image(sample))) for sample in samples]
    inputs = [primary_input(sample) for sample in samples]
    arrays = [pixels(value) for value in inputs]
    integer = not inputs[0].is_floating_point()
    scale = PixelScale.of(arrays, integer, _channels(presentation.mean, 0.0), _channels(presentation.std, 1.0))
    return [encode(scale.apply(array)) for array in arrays]


def _channels(value: float | Sequence[float] | None, default: float) -> tuple[float, ...]:
    if value is None:
        return (default,)
    return tuple(float(v) for v in value) if isinstance(value, Sequence) else (float(value),)


def _text(sample: Sample, presentation: Presentation) -> str:
    if presentation.text is not None:
        return shorten(str(presentation.text(sample)), MAX_TEXT)
    value = primary_input(sample)
    if isinstance(value, Tensor):
        mask = sample.get("attention_mask") if isinstance(sample, Mapping) else None
        tokens = value.flatten()[mask.flatten().bool()] if isinstance(mask, Tensor) else value.flatten()
        rest = " …" if tokens.numel() > MAX_TOKENS else ""
        return shorten(" ".join(str(token) for token in tokens[:MAX_TOKENS].tolist()) + rest, MAX_TEXT)
    return shorten(str(value), MAX_TEXT)


def _cells(sample: Sample) -> tuple[str, ...]:
    value = primary_input(sample)
    if isinstance(value, Tensor):
        return tuple(number(float(v)) for v in value.detach().flatten()[:MAX_CELLS].tolist())
    return (shorten(str(value), MAX_NAME),)


def _numel(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else 1
