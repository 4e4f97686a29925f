"""How each model of the zoo is trained: the published recipes, and ours where none is published."""

from __future__ import annotations

from dataclasses import replace

from refluence.errors import DataError
from refluence.training import Recipe
from refluence.zoo.models import check_names

_MLP = Recipe(learning_rate=0.01, momentum=0.9, epochs=50, batch_size=64)
_LR = Recipe(learning_rate=0.01, epochs=20, batch_size=32)
_CNN = Recipe(learning_rate=0.05, momentum=0.9, epochs=10, batch_size=64, schedule="cosine")
_RESNET9 = Recipe(learning_rate=0.01, momentum=0.9, epochs=10, batch_size=64)
_ALL_CNN = Recipe(learning_rate=3e-3, optimizer="adam", epochs=40, batch_size=100, l2=1e-3, schedule="cosine")
_MUSICTRANSFORMER = Recipe(learning_rate=1e-4, optimizer="adam", betas=(0.9, 0.98), epochs=20, batch_size=64)
_NANOGPT = Recipe(
    learning_rate=1e-3,
    optimizer="adamw",
    betas=(0.9, 0.99),
    weight_decay=0.1,
    schedule="cosine",
    final_share=0.1,
    warmup=100,
    clip=1.0,
    epochs=41,
    steps=5000,
    batch_size=32,
)
_GPT = replace(_NANOGPT, learning_rate=3e-3, warmup=50, epochs=3, steps=None, batch_size=8)

_MNIST = {"mlp": _MLP, "lr": _LR, "softmax": _LR, "cnn": _CNN, "all_cnn": _ALL_CNN}
_CIFAR = {"resnet9": _RESNET9, "cnn": _CNN, "mlp": _MLP, "lr": _LR}
_RECIPES: dict[str, dict[str, Recipe]] = {
    "digits": {
        "mlp": Recipe(learning_rate=0.1, momentum=0.9, epochs=30, batch_size=64, schedule="cosine"),
        "lr": Recipe(learning_rate=0.5, momentum=0.9, epochs=40, batch_size=64, schedule="cosine"),
        "cnn": Recipe(learning_rate=0.1, momentum=0.9, epochs=30, batch_size=64, schedule="cosine"),
    },
    "mnist": _MNIST,
    "fashion_mnist": _MNIST,
    "cifar2": _CIFAR,
    "cifar10": _CIFAR,
    "maestro": {"musictransformer": _MUSICTRANSFORMER},
    "shakespeare": {"gpt": _GPT, "nanogpt": _NANOGPT},
}


def recipe_for(
    dataset: str, model: str, *, l2: float | None = None, epochs: int | None = None, steps: int | None = None
) -> Recipe:
    """The recipe of a model of the zoo.

    Args:
        dataset, model: as in `build_model`.
        l2: another weight decay of the objective.
        epochs: other passes over the rows; a recipe of so many steps is one of so many epochs then.
        steps: stop after so many steps instead.

    Raises:
        DataError: the zoo has no such model, both epochs and steps, or a number out of its range.
    """
    check_names(dataset, model)
    recipe = _RECIPES[dataset][model]
    if epochs is not None and steps is not None:
        raise DataError(f"give epochs or steps, not both (epochs={epochs}, steps={steps})")
    if l2 is not None:
        recipe = replace(recipe, l2=l2)
    if epochs is not None:
        recipe = replace(recipe, epochs=epochs, steps=None)
    return recipe if steps is None else replace(recipe, steps=steps)
