"""A data set with a trained model: what the published benchmarks attribute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refluence.errors import DataError
from refluence.report.presentation import Presentation
from refluence.task import Task
from refluence.zoo import checkpoints
from refluence.zoo.datasets import DataSplit, Pair, load_dataset
from refluence.zoo.models import build_model
from refluence.zoo.training import Recipe, evaluate, recipe_for, stream, train


@dataclass(frozen=True)
class Benchmark:
    """A trained model and its data, ready for `Influence(benchmark.task).fit(benchmark.train)`.

    Attributes:
        task: the trained model in eval mode, with its loss and weight decay.
        train: inputs (n, 1, height, width) and the labels it was trained on (n,), the flipped ones included.
        test: the same for the test rows, with their true labels.
        presentation: how the report shows a row.
        description: data, model, recipe and accuracy, in one sentence each.
        accuracy: share of the test rows predicted right.
        train_loss: mean cross-entropy over the train rows.
        flipped: the train rows whose labels were made wrong on purpose, ascending; empty without label noise.
        recipe: how it was trained.
        trained_now: False where the model came from the cache.
    """

    task: Task
    train: Pair
    test: Pair
    presentation: Presentation
    description: str
    accuracy: float
    train_loss: float
    flipped: Tensor
    recipe: Recipe
    trained_now: bool


def load_benchmark(
    dataset: str,
    model: str,
    seed: int = 0,
    label_noise: float = 0.0,
    device: str | torch.device | None = None,
    progress: bool = True,
    retrain: bool = False,
    *,
    l2: float = 0.0,
    n_train: int | None = None,
    n_test: int | None = None,
) -> Benchmark:
    """A data set of the zoo with a model trained by its published recipe, from the cache where nothing has changed.

    Args:
        dataset: "digits" or "mnist".
        model: "mlp", "lr" or "cnn".
        seed: of the initialisation, shuffling, dropout and the choice of flipped labels.
        label_noise: share of the train labels replaced by a different class before training.
        device: where the model is put; it is trained on the CPU, so that the seed alone determines it.
        progress: show how far the training is.
        retrain: train even if the cache has this model.
        l2: weight decay of training and task: mean loss + (l2/2)·‖θ‖².
        n_train: take the first so many train rows instead of the published number.
        n_test: the same for the test rows.

    Raises:
        DataError: an unknown name, data that is missing or damaged, or a label noise outside 0…1.
    """
    recipe = recipe_for(dataset, model, l2=l2)
    split = load_dataset(dataset, n_train=n_train, n_test=n_test)
    labels, flipped = flip_labels(split.train[1], len(split.class_names), label_noise, seed)
    data = (split.train[0], labels)
    with torch.random.fork_rng(devices=[]):  # initialising draws random numbers
        network = build_model(dataset, model)
    training = checkpoints.Training(dataset, model, str(network), recipe, seed, checkpoints.data_hash(data))
    trained_now = retrain or not checkpoints.load_into(network, training)
    if trained_now:
        network = train(lambda: build_model(dataset, model), data, recipe, seed=seed, progress=progress)
    accuracy, train_loss = evaluate(network, split.test).accuracy, evaluate(network, data).loss
    if trained_now:
        checkpoints.save(training, network, test_accuracy=accuracy, train_loss=train_loss)
    return Benchmark(
        task=Task(network.to(device) if device is not None else network, l2=l2),
        train=data,
        test=split.test,
        presentation=_presentation(split),
        description=_describe(split, model, network, recipe, seed, accuracy, len(flipped)),
        accuracy=accuracy,
        train_loss=train_loss,
        flipped=flipped,
        recipe=recipe,
        trained_now=trained_now,
    )


def flip_labels(labels: Tensor, classes: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Labels (n,) of which a seeded share is replaced by another class, and the rows that were, ascending.

    Raises:
        DataError: a share outside 0…1.
    """
    if not 0 <= share <= 1:
        raise DataError(f"label_noise must be a share from 0 to 1, not {share!r}")
    generator = torch.Generator().manual_seed(stream(seed, "label noise"))
    rows = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))].sort().values
    shift = torch.randint(1, classes, (len(rows),), generator=generator)
    wrong = labels.clone()
    wrong[rows] = (labels[rows] + shift) % classes
    return wrong, rows


def _presentation(split: DataSplit) -> Presentation:
    return Presentation(
        kind="image",
        class_names=list(split.class_names),
        mean=split.image.mean,
        std=split.image.std,
    )


def _describe(
    split: DataSplit, model: str, network: torch.nn.Module, recipe: Recipe, seed: int, accuracy: float, flipped: int
) -> str:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    momentum = f", momentum {recipe.momentum:g}" if recipe.momentum else ""
    weight_decay = f", l2 {recipe.l2:g}" if recipe.l2 else ""
    step = f"{recipe.learning_rate:g}{' falling to 0' if recipe.decay else ''}"
    noise = f" The labels of {flipped:,} train rows were made wrong on purpose before training." if flipped else ""
    return (
        f"{split.provenance}. Model {model}: {parameters:,} parameters, SGD with step {step}"
        f"{momentum}{weight_decay}, {recipe.epochs} epochs, batch {recipe.batch_size}, seed {seed}.{noise} "
        f"Test accuracy {accuracy:.1%}."
    )
