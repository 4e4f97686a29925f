"""The convolutional network of Koh & Liang's Figure 2: smooth, so that its loss has second derivatives everywhere."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor, nn

WIDTH, LAST = 8, 10


class AllCnn(nn.Module):
    """Six convolutions with tanh, the mean over space, and a linear layer: 2,616 parameters on MNIST.

    Five 3×3 convolutions of 8 channels with strides 1, 2, 1, 2, 1 and no padding, then a 1×1 one of 10 channels, all
    with biases.

    Source: Koh & Liang 2017, "Understanding Black-box Predictions via Influence Functions", Section 4.1, after the
    All-CNN-C of Springenberg et al. 2014.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stride in (1, 2, 1, 2, 1):
            layers += [Convolution(channels, WIDTH, 3, stride), nn.Tanh()]
            channels = WIDTH
        self.features = nn.Sequential(*layers, Convolution(WIDTH, LAST, 1), nn.Tanh())
        self.head = Head(LAST, classes)

    def forward(self, images: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n classes"]:
        """Logits of images."""
        out: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return out


class Convolution(nn.Conv2d):
    """A convolution that starts from a normal distribution of deviation 2/√fan_in, cut at two of them, and bias 0."""

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        _truncated_normal(self.weight, 2 / math.sqrt(self.weight[0].numel()))
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class Head(nn.Linear):
    """The same for a linear layer, with deviation 1/√fan_in."""

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        _truncated_normal(self.weight, 1 / math.sqrt(self.in_features))
        nn.init.zeros_(self.bias)


def _truncated_normal(weight: Tensor, deviation: float) -> None:
    nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)
