"""The models of the zoo; each takes images (n, 1, height, width) and gives logits (n, 10)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from refluence.errors import DataError

CLASSES = 10


def build_model(dataset: str, model: str) -> nn.Module:
    """An untrained model for a data set, with PyTorch's default initialisation from the global random state.

    Raises:
        DataError: no such model for this data set.
    """
    check_names(dataset, model)
    return _MODELS[dataset, model]()


def check_names(dataset: str, model: str) -> None:
    """Raise a DataError that lists the known names unless the zoo has this data set and a model of this name for it."""
    if model not in model_names(dataset):
        raise DataError(f"no model {model!r} for data set {dataset!r}: use one of {', '.join(model_names(dataset))}")


def model_names(dataset: str) -> tuple[str, ...]:
    """The models that the zoo has for a data set.

    Raises:
        DataError: an unknown data set.
    """
    names = tuple(model for known, model in _MODELS if known == dataset)
    if not names:
        known = ", ".join(dict.fromkeys(known for known, _ in _MODELS))
        raise DataError(f"unknown data set {dataset!r}: use one of {known}")
    return names


def _linear(pixels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, CLASSES))


def _digits_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def _mnist_mlp() -> nn.Module:
    """The published 784-128-64-10 network: 109,386 parameters."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 128),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(64, CLASSES),
    )


def _cnn(side: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (side // 4) ** 2, CLASSES),
    )


_MODELS: dict[tuple[str, str], Callable[[], nn.Module]] = {
    ("digits", "mlp"): _digits_mlp,
    ("digits", "lr"): lambda: _linear(64),
    ("digits", "cnn"): lambda: _cnn(8),
    ("mnist", "mlp"): _mnist_mlp,
    ("mnist", "lr"): lambda: _linear(784),
    ("mnist", "cnn"): lambda: _cnn(28),
}
