"""A data set with a trained model: what the published benchmarks attribute."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from refluence.errors import DataError
from refluence.report.presentation import Presentation, Sample, primary_input
from refluence.task import Task
from refluence.training import Recipe, stream, train
from refluence.zoo import checkpoints
from refluence.zoo.datasets import DataSplit, Pair, TokenFormat, load_dataset
from refluence.zoo.fit import Fit, evaluate
from refluence.zoo.models import build_model
from refluence.zoo.recipes import recipe_for
from refluence.zoo.tasks import pair_for, task_for


@dataclass(frozen=True)
class Benchmark:
    """A trained model and its data, ready for `Influence(benchmark.task).fit(benchmark.train)`.

    Attributes:
        task: the trained model in eval mode, with its loss and weight decay.
        train: inputs (n, ...) and the targets it was trained on, (n,) or (n, length), flipped labels included.
        test: the same for the test rows, with their true labels.
        presentation: how the report shows a row.
        description: data, model, recipe and accuracy, in one sentence each.
        accuracy: share of the targets of the test rows predicted right.
        train_loss: mean loss over the train rows.
        test_loss: mean loss over the test rows.
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
    test_loss: float
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
    l2: float | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    epochs: int | None = None,
    steps: int | None = None,
) -> Benchmark:
    """A data set of the zoo with a model trained by its recipe, from the cache where nothing has changed.

    Args:
        dataset: as in `load_dataset`.
        model: as in `build_model`; `model_names(dataset)` lists them.
        seed: of the initialisation, shuffling, dropout and the choice of flipped labels.
        label_noise: share of the train labels replaced by a different class before training.
        device: where the model is trained and put; initialisation and shuffling do not depend on it.
        progress: show how far the training is.
        retrain: train even if the cache has this model.
        l2: weight decay of training and task, mean loss + (l2/2)·‖θ‖²; None: the recipe's.
        n_train: take the first so many train rows instead of the published number.
        n_test: the same for the test rows.
        epochs, steps: train for so many instead of as long as the recipe says.

    Raises:
        DataError: an unknown name, data that is missing or damaged, a label noise outside 0…1 or on sequences, or a
            number that no recipe can have.
    """
    recipe = recipe_for(dataset, model, l2=l2, epochs=epochs, steps=steps)
    split = load_dataset(dataset, n_train=n_train, n_test=n_test)
    data, flipped = _train_rows(split, model, label_noise, seed)
    test = pair_for(model, split.test)
    with torch.random.fork_rng(devices=[]):  # initialising draws random numbers
        network = build_model(dataset, model).to(device)
    task = task_for(model, network, recipe.l2)
    training = checkpoints.Training(
        dataset,
        model,
        checkpoints.architecture(network),
        task.describe(),
        recipe,
        seed,
        checkpoints.data_hash(data),
        next(network.parameters()).device.type,
    )
    measured = None if retrain else checkpoints.load_into(network, training)
    trained_now = measured is None
    if trained_now:
        build = partial(build_model, dataset, model)
        task = task_for(model, train(task, data, recipe, build=build, seed=seed, progress=progress), recipe.l2)
    test_data = checkpoints.data_hash(test)
    if measured is None:
        measured = checkpoints.Measured(evaluate(task, data), evaluate(task, test), test_data)
        checkpoints.save(training, task.model, measured)
    on_test = measured.test if measured.test_data == test_data else evaluate(task, test)
    return Benchmark(
        task=task,
        train=data,
        test=test,
        presentation=_presentation(split),
        description=_describe(split, model, task.model, recipe, seed, on_test, len(flipped)),
        accuracy=on_test.accuracy,
        train_loss=measured.train.loss,
        test_loss=on_test.loss,
        flipped=flipped,
        recipe=recipe,
        trained_now=trained_now,
    )


def load_train(
    dataset: str, model: str, seed: int = 0, label_noise: float = 0.0, *, n_train: int | None = None
) -> Pair:
    """The train rows of `load_benchmark` alone, for a process that needs no model, such as a worker of a cluster.

    Raises:
        DataError: as in `load_benchmark`.
    """
    split = load_dataset(dataset, n_train=n_train, n_test=1, progress=False)
    return _train_rows(split, model, label_noise, seed)[0]


def _train_rows(split: DataSplit, model: str, label_noise: float, seed: int) -> tuple[Pair, Tensor]:
    """The rows that a model is trained on, and which of them have a wrong label."""
    if label_noise and split.tokens is not None:
        raise DataError(f"label_noise needs one label a row; the rows of {split.name!r} are sequences: leave it out")
    labels, flipped = flip_labels(split.train[1], len(split.class_names), label_noise, seed)
    return pair_for(model, (split.train[0], labels)), flipped


def load_untrained(
    dataset: str, model: str, *, l2: float | None = None, n_train: int | None = None, n_test: int | None = None
) -> tuple[Task, Pair, Pair]:
    """The task of a model as initialised, with the train and test rows of its benchmark: enough to plan.

    Raises:
        DataError: as in `load_benchmark`.
    """
    recipe = recipe_for(dataset, model, l2=l2)
    split = load_dataset(dataset, n_train=n_train, n_test=n_test)
    with torch.random.fork_rng(devices=[]):
        network = build_model(dataset, model)
    return task_for(model, network, recipe.l2), pair_for(model, split.train), pair_for(model, split.test)


def flip_labels(labels: Tensor, classes: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Labels (n,) of which a seeded share is replaced by another class, and the rows that were, ascending.

    Raises:
        DataError: a share outside 0…1.
    """
    if not 0 <= share <= 1:
        raise DataError(f"label_noise must be a share from 0 to 1, not {share!r}")
    generator = torch.Generator().manual_seed(stream(seed, "label noise"))
    rows = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))].sort().values
    if len(rows) == 0:
        return labels, rows
    shift = torch.randint(1, classes, (len(rows),), generator=generator)
    wrong = labels.clone()
    wrong[rows] = (labels[rows] + shift) % classes
    return wrong, rows


def _presentation(split: DataSplit) -> Presentation:
    if split.tokens is not None:
        return Presentation(
            kind="text",
            class_names=token_names(split.tokens),
            text=partial(_as_text, split.tokens),
        )
    assert split.image is not None
    return Presentation(
        kind="image",
        class_names=list(split.class_names),
        mean=split.image.mean,
        std=split.image.std,
    )


def _as_text(tokens: TokenFormat, sample: Sample) -> str:
    return tokens.decode(primary_input(sample))


def token_names(tokens: TokenFormat) -> list[str]:
    """Every token as text for people; what cannot be seen in quotes."""
    texts = [tokens.decode([token]) for token in range(tokens.vocabulary)]
    return [text if text.strip() else repr(text) for text in texts]


def _describe(
    split: DataSplit, model: str, network: nn.Module, recipe: Recipe, seed: int, fit: Fit, flipped: int
) -> str:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    noise = f" The labels of {flipped:,} train rows were made wrong on purpose before training." if flipped else ""
    what = "Test accuracy" if split.tokens is None else f"Test loss {fit.loss:.3f}, accuracy of the next token"
    return (
        f"{split.provenance}. Model {model}: {parameters:,} parameters, {recipe.describe()}, seed {seed}.{noise} "
        f"{what} {fit.accuracy:.1%}."
    )
