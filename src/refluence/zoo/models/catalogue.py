"""The models that the zoo has for each data set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from refluence.errors import DataError
from refluence.zoo.models.all_cnn import AllCnn
from refluence.zoo.models.cnn import cnn
from refluence.zoo.models.gpt import Gpt
from refluence.zoo.models.linear import softmax_regression
from refluence.zoo.models.mlp import mlp
from refluence.zoo.models.musictransformer import MusicTransformer
from refluence.zoo.models.resnet9 import ResNet9

Builder = Callable[[], nn.Module]


def build_model(dataset: str, model: str) -> nn.Module:
    """An untrained model for a data set, initialised from the global random state.

    Raises:
        DataError: no such model for this data set.
    """
    check_names(dataset, model)
    return _MODELS[dataset][model]()


def check_names(dataset: str, model: str) -> None:
    """Raise a DataError that lists the known names unless the zoo has this data set and a model of this name for it."""
    if model not in model_names(dataset):
        raise DataError(f"no model {model!r} for data set {dataset!r}: use one of {', '.join(model_names(dataset))}")


def model_names(dataset: str) -> tuple[str, ...]:
    """The models that the zoo has for a data set.

    Raises:
        DataError: an unknown data set.
    """
    if dataset not in _MODELS:
        raise DataError(f"unknown data set {dataset!r}: use one of {', '.join(_MODELS)}")
    return tuple(_MODELS[dataset])


def _published_mlp(pixels: int, classes: int) -> nn.Module:
    return mlp(pixels, (128, 64), classes, dropout=0.1)


def _mnist() -> dict[str, Builder]:
    return {
        "mlp": partial(_published_mlp, 784, 10),
        "lr": partial(softmax_regression, 784, 10),
        "softmax": partial(softmax_regression, 784, 10, bias=False),
        "cnn": partial(cnn, 1, 28, 10),
        "all_cnn": partial(AllCnn, 1, 10),
    }


def _cifar(classes: int) -> dict[str, Builder]:
    return {
        "resnet9": partial(ResNet9, classes),
        "cnn": partial(cnn, 3, 32, classes),
        "mlp": partial(_published_mlp, 3072, classes),
        "lr": partial(softmax_regression, 3072, classes),
    }


_MODELS: dict[str, dict[str, Builder]] = {
    "digits": {
        "mlp": partial(mlp, 64, (64,), 10),
        "lr": partial(softmax_regression, 64, 10),
        "cnn": partial(cnn, 1, 8, 10),
    },
    "mnist": _mnist(),
    "fashion_mnist": _mnist(),
    "cifar2": _cifar(2),
    "cifar10": _cifar(10),
    "maestro": {"musictransformer": MusicTransformer},
    "shakespeare": {
        "gpt": partial(Gpt, vocabulary=65, context=256, depth=2, width=64, heads=4),
        "nanogpt": partial(Gpt, vocabulary=65, context=256, depth=6, width=384, heads=6, dropout=0.2),
    },
}
