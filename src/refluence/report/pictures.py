"""Arrays as small pictures: what the page embeds."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from refluence.errors import DataError

MAX_SIDE = 128
PIXELATED_SIDE = 64
MIN_FLAT_PIXELS = 64


@dataclass(frozen=True)
class Picture:
    """An encoded picture; `pixelated` where it is so small that its pixels should stay visible."""

    uri: str
    width: int
    height: int

    @property
    def pixelated(self) -> bool:
        """True where the browser should show the pixels as squares."""
        return max(self.width, self.height) <= PIXELATED_SIDE


def image_shape(shape: tuple[int, ...], floating: bool) -> str | None:
    """How an array of this shape is a picture: "CHW", "HWC", "HW", "flat", or None where it does not look like one."""

    def sides(height: int, width: int) -> bool:
        return min(height, width) >= 4 and max(height, width) <= 4 * min(height, width)

    if len(shape) == 3 and shape[0] in (1, 3) and sides(shape[1], shape[2]):
        return "CHW"
    if len(shape) == 3 and shape[2] in (1, 3) and sides(shape[0], shape[1]):
        return "HWC"
    if len(shape) == 2 and sides(*shape):
        return "HW"
    if len(shape) == 1 and floating and shape[0] >= MIN_FLAT_PIXELS and int(shape[0] ** 0.5) ** 2 == shape[0]:
        return "flat"
    return None


def pixels(sample: Tensor) -> NDArray[np.float64]:
    """A sample of an image-like shape as (H, W, C) with C 1 or 3, in the sample's own units.

    Raises:
        DataError: a shape that is not that of a picture.
    """
    shape = tuple(sample.shape)
    layout = image_shape(shape, floating=True)
    array = sample.detach().cpu().double().numpy()
    match layout:
        case "CHW":
            return array.transpose(1, 2, 0)
        case "HWC":
            return array
        case "HW":
            return array[..., None]
        case "flat":
            side = int(shape[0] ** 0.5)
            return array.reshape(side, side, 1)
    raise DataError(
        f"an input of shape {shape} is not a picture (C×H×W or H×W×C with C of 1 or 3, H×W, or a flat square): "
        "give Presentation(image=function of a sample that returns a uint8 array H×W or H×W×3)"
    )


@dataclass(frozen=True)
class PixelScale:
    """Maps a sample's units to 0…255: `mean`/`std` undo a normalisation, then `low`…`high` become black and white."""

    low: float = 0.0
    high: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @classmethod
    def of(
        cls, arrays: Iterable[NDArray[np.float64]], integer: bool, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> PixelScale:
        """One scale for all pictures of a page, so that their brightness can be compared."""
        if integer:
            return cls(0.0, 255.0, mean, std)
        ends = [(float(np.nanmin(a * std + mean)), float(np.nanmax(a * std + mean))) for a in arrays if a.size]
        low, high = (min(e[0] for e in ends), max(e[1] for e in ends)) if ends else (0.0, 1.0)
        normalised_by_user = mean != (0.0,) or std != (1.0,)
        if normalised_by_user or (low >= 0 and 0.5 < high <= 1):
            return cls(0.0, 1.0, mean, std)
        return cls(low, high, mean, std)

    def apply(self, array: NDArray[np.float64]) -> NDArray[np.uint8]:
        """The picture in bytes."""
        span = self.high - self.low
        scaled = (array * self.std + self.mean - self.low) / (span if span > 0 else 1.0)
        return np.round(255 * np.clip(np.nan_to_num(scaled), 0, 1)).astype(np.uint8)


def encode(array: NDArray[Any]) -> Picture:
    """A uint8 array H×W, H×W×1 or H×W×3 as PNG, or as JPEG where that is smaller; at most 128 pixels a side.

    Raises:
        DataError: another type or shape.
    """
    array = np.asarray(array)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype != np.uint8 or array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise DataError(
            f"a picture must be a uint8 array H×W or H×W×3, not {array.dtype} of shape {array.shape}: "
            "change what Presentation(image=...) returns"
        )
    image = Image.fromarray(array)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    candidates = [("png", _bytes(image, "PNG", optimize=True))]
    if max(image.size) > PIXELATED_SIDE:
        candidates.append(("jpeg", _bytes(image, "JPEG", quality=82)))
    kind, data = min(candidates, key=lambda candidate: len(candidate[1]))
    return Picture(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", *image.size)


def _bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
