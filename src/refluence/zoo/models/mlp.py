"""Networks of fully connected layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def mlp(features: int, hidden: Sequence[int], classes: int, *, dropout: float = 0.0) -> nn.Module:
    """Linear layers with ReLU, and dropout where asked, after each hidden one; inputs (n, ...) to logits (n, classes).

    784-128-64-10 with dropout 0.1 is the published network of MNIST: 109,386 parameters.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(features, width), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
        features = width
    return nn.Sequential(*layers, nn.Linear(features, classes))
