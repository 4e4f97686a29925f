"""The residual network of the published CIFAR-2 benchmark."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ResNet9(nn.Module):
    """A 3×3 convolution to 64 channels and three residual blocks: 4,825,154 parameters with two classes.

    The blocks have 128, 256 and 512 channels and strides 1, 2, 2; the mean over space and a linear layer follow.
    Convolutions have no bias.

    Source: dattri (Deng et al. 2024), `cifar2_resnet9`, after He et al. 2016.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.blocks = nn.Sequential(ResidualBlock(64, 128, 1), ResidualBlock(128, 256, 2), ResidualBlock(256, 512, 2))
        self.head = nn.Linear(512, classes)

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n classes"]:
        """Logits of images."""
        out: Tensor = self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))
        return out


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, each with batch normalisation and ReLU, beside a 1×1 one with batch normalisation.

    As published, there is a ReLU before the sum as well as after it.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Float[Tensor, "n inputs height width"]) -> Float[Tensor, "n outputs newheight newwidth"]:
        """ReLU of the sum of both ways."""
        return F.relu(self.residual(x) + self.shortcut(x))
