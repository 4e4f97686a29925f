from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from refluence.errors import DataError
from refluence.report.pictures import MAX_SIDE, Picture, PixelScale, encode, image_shape, pixels


def decoded(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.uri.split(",")[1]))))


@pytest.mark.parametrize(
    ("shape", "floating", "layout"),
    [
        ((3, 32, 32), True, "CHW"),
        ((1, 28, 28), True, "CHW"),
        ((32, 32, 3), False, "HWC"),
        ((28, 28), True, "HW"),
        ((784,), True, "flat"),
        ((64,), True, "flat"),
        ((784,), False, None),
        ((30,), True, None),
        ((49,), True, None),
        ((4, 200), True, None),
        ((12, 32, 32), True, None),
        ((), True, None),
    ],
)
def test_image_shape(shape: tuple[int, ...], floating: bool, layout: str | None) -> None:
    assert image_shape(shape, floating) == layout


def test_channels_first_become_last() -> None:
    sample = torch.arange(3 * 4 * 5).reshape(3, 4, 5)
    assert pixels(sample).shape == (4, 5, 3)
    assert pixels(sample)[1, 2].tolist() == sample[:, 1, 2].tolist()


def test_what_is_not_a_picture_is_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"\(2, 90\).*Presentation\(image="):
        pixels(torch.zeros(2, 90))
    with pytest.raises(DataError, match="uint8"):
        encode(np.zeros((4, 4)))


def test_scale_undoes_the_normalisation_and_shares_one_range() -> None:
    dark, light = np.full((4, 4, 1), -1.0), np.full((4, 4, 1), 3.0)
    shared = PixelScale.of([dark, light], integer=False, mean=(0.0,), std=(1.0,))
    assert (shared.apply(dark).max(), shared.apply(light).min()) == (0, 255)
    known = PixelScale.of([dark, light], integer=False, mean=(0.5,), std=(0.5,))
    assert (known.apply(dark)[0, 0, 0], known.apply(np.zeros((4, 4, 1)))[0, 0, 0], known.apply(light).max()) == (
        0,
        128,
        255,
    )
    unit = PixelScale.of([np.full((4, 4, 1), 0.6)], integer=False, mean=(0.0,), std=(1.0,))
    assert unit.apply(np.full((1, 1, 1), 0.6))[0, 0, 0] == 153


def test_small_pictures_are_lossless_and_large_ones_small() -> None:
    array = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    small = encode(array)
    assert small.pixelated
    assert (decoded(small) == array).all()
    large = encode(np.random.default_rng(0).integers(0, 256, (500, 300, 3), dtype=np.uint8))
    assert not large.pixelated
    assert max(large.width, large.height) == MAX_SIDE
    assert len(large.uri) < 40_000
