"""The images: normalised for networks, and as pixels in 0…1, train rows first."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float32, Float64, Int64
from torch import Tensor, cat

from refluence.errors import DataError
from refluence.studies.leverage_basis.options import Options
from refluence.zoo import load_dataset


@dataclass(frozen=True, eq=False)
class Images:
    """n images of the train and the test set, in this order.

    Args:
        inputs: as the networks take them, (n, 1, height, width).
        pixels: 0…1, flat.
        labels: of 10 classes.
        n_train: the first rows.
    """

    inputs: Float32[Tensor, "n 1 h w"]
    pixels: Float64[Tensor, "n d"]
    labels: Int64[Tensor, " n"]
    n_train: int

    @property
    def side(self) -> int:
        """Height and width."""
        return self.inputs.shape[-1]

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels of the train rows."""
        return self.inputs[: self.n_train], self.labels[: self.n_train]

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels of the test rows."""
        return self.inputs[self.n_train :], self.labels[self.n_train :]


def load_images(options: Options) -> Images:
    """The data set of the study.

    Raises:
        DataError: it is not on this machine, or its images are not square with one channel.
    """
    data = load_dataset(options.dataset, n_train=options.n_train, n_test=options.n_test)
    image = data.image
    inputs = cat([data.train[0], data.test[0]])
    if image is None or inputs.shape[1] != 1 or inputs.shape[2] != inputs.shape[3]:
        raise DataError(f"the study needs square images of one channel, which {options.dataset!r} does not have")
    levels = 255 if data.name != "digits" else 16
    pixels = ((inputs.double() * image.std + image.mean) * levels).round().flatten(1) / levels
    return Images(inputs, pixels, cat([data.train[1], data.test[1]]), len(data.train[1]))
