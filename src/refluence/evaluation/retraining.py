"""Ground truth by retraining: many models on parts of the data, and what they measure on the test examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from refluence.batches import Batches, Data
from refluence.errors import DataError, TaskError
from refluence.evaluation.ground_truth import GroundTruth
from refluence.evaluation.measuring import measure
from refluence.evaluation.retraining_store import RetrainingStore, fingerprint
from refluence.evaluation.subsets import random_subsets
from refluence.execution import Execution
from refluence.progress import track
from refluence.task import Task
from refluence.training.recipe import Recipe
from refluence.training.single import own_randomness
from refluence.training.together import Trainer

OwnTraining = Callable[[list[int], int], nn.Module]
States = dict[str, Tensor]


def retrain(
    task: Task,
    train: Data,
    test: Data,
    masks: int | Bool[Tensor, "m n"],
    recipe: Recipe | OwnTraining,
    *,
    seeds: int = 1,
    seed: int = 0,
    baseline: int = 0,
    build: Callable[[], nn.Module] | None = None,
    together: int | None = None,
    keep_models: bool = False,
    path: str | Path | None = None,
    execution: Execution | None = None,
    progress: bool = True,
) -> GroundTruth:
    """Train a model on every subset of the train examples, and measure it on every test example.

    Repetition r of subset s is trained with `model_seed(seed, s, r, seeds)` = seed + s·seeds + r, and baseline b with
    seed + m·seeds + b, on all examples. So calls whose seeds are fewer than m apart share random halves, and with one
    seed a subset the models too: take seeds further apart. Models are trained together where `torch.func.vmap` can
    follow them; the result does not depend on it beyond rounding.

    Args:
        task: what is trained and measured; its model's parameters are not used unless frozen.
        train: the n train examples, as `Influence.fit` takes them.
        test: the k test examples.
        masks: (m, n), True where an example is trained on; or a number of random halves.
        recipe: how each model is trained, or a function (rows, seed) -> trained model of the task's architecture.
        seeds: models a subset, which are averaged when the ground truth is read.
        seed: of the random halves and of the models.
        baseline: models on all examples.
        build: makes an untrained model; None: a `fresh_model` of the task's.
        together: most models trained together; None: as many as memory and caches serve well.
        keep_models: keep the trained models too, for `load_models`; needs `path`.
        path: a folder in which finished models are kept and training states saved: the same call goes on after a kill.
        execution: the memory that may be used.
        progress: show how far it is.

    Raises:
        DataError: masks of another shape, a subset without examples, a folder that holds another retraining, or
            `keep_models` without a folder.
        TaskError: a model that cannot be drawn anew, or a function that returns another architecture.
    """
    if not isinstance(recipe, Recipe) and not callable(recipe):
        raise DataError(
            f"recipe is {recipe!r}: give an rf.evaluation.Recipe(learning_rate=…, epochs=…, batch_size=…), or a "
            "function (rows, seed) -> trained model"
        )
    if seeds < 1 or baseline < 0:
        raise DataError(f"seeds must be at least 1 and baseline at least 0, not {seeds!r} and {baseline!r}")
    if keep_models and path is None:
        raise DataError("keep_models needs a folder to keep them in: give path")
    n = Batches(train, name="train data").n
    chosen = _masks(masks, n, seed)
    rows, model_seeds = _models(chosen, seeds, seed, baseline)
    memory = None if execution is None else execution.memory
    store: RetrainingStore | None = None
    found: dict[int, dict[str, Tensor]] = {}
    if path is not None:
        described = fingerprint(task, train, test, chosen, recipe, build) | {
            "seeds": seeds,
            "seed": seed,
            "baseline": baseline,
            "keep_models": keep_models,
        }
        store = RetrainingStore.open(Path(path), described)
        found = store.measurements()
    left = [i for i in range(len(rows)) if i not in found]
    how: dict[str, Any] = {} if store is None else dict(store.how)
    if left:
        folder = None if store is None else store.folder
        if isinstance(recipe, Recipe):
            asked = {"together": together, "memory": memory}
            groups = how["groups"] if how.get("asked") == asked else None
            trainer = Trainer(
                task, train, rows, model_seeds, recipe, build=build, together=together, memory=memory,
                models=left, groups=groups,
            )  # fmt: skip
            chosen_groups = trainer.grouping.groups
            how = {
                "together": trainer.grouping.together,
                "why": trainer.grouping.reason,
                "asked": asked,
                "groups": chosen_groups,
            }
            unfinished = [g for g, models in enumerate(chosen_groups) if not set(models) <= found.keys()]
            trained = trainer.run(unfinished, path=folder, progress=progress)
        else:
            how = {"together": False, "why": "trained by a function of the user's"}
            trained = _own_models(recipe, rows, model_seeds, left, progress)
        if store is not None:
            store.describe(how)
        for models, states in trained:
            _check_architecture(task, states)
            measured = measure(task, states, test)
            if store is not None:
                store.add(models, measured, states if keep_models else {})
            for k, i in enumerate(models):
                found[i] = {name: values[k] for name, values in measured.items()}
    manifest = {
        "task": task.describe(),
        "recipe": dataclasses.asdict(recipe) if isinstance(recipe, Recipe) else getattr(recipe, "__qualname__", "own"),
        "seed": seed,
        "trained_together": how["together"],
        "training": how["why"],
        "torch": torch.__version__,
    }
    truth = _ground_truth(chosen, found, seeds, baseline, manifest)
    if store is not None:
        store.finish(truth)
    return truth


def model_seed(seed: int, subset: int, repetition: int, seeds: int) -> int:
    """The seed of a subset's model: seed + subset·seeds + repetition, the published scheme."""
    return seed + subset * seeds + repetition


def load_models(path: str | Path, task: Task) -> list[nn.Module]:
    """The models that `retrain(..., keep_models=True, path=path)` kept, in eval mode.

    Repetition r of subset s is at s·seeds + r; the baselines follow.

    Raises:
        DataError: a folder without models, an unfinished retraining, or a damaged file.
        TaskError: models of another architecture than the task's.
    """
    return RetrainingStore.existing(Path(path)).models(task)


def _masks(masks: int | Tensor, n: int, seed: int) -> Bool[Tensor, "m n"]:
    if isinstance(masks, int):
        return random_subsets(n, masks, seed=seed)
    masks = torch.as_tensor(masks)
    if masks.dtype != torch.bool or masks.ndim != 2 or masks.shape[1] != n or len(masks) == 0:
        raise DataError(
            f"masks must be boolean (subsets, {n}) for {n} train examples, or a number of random halves; they are "
            f"{masks.dtype} {tuple(masks.shape)}"
        )
    empty = (~masks.any(dim=1)).nonzero()
    if len(empty):
        raise DataError(f"subset {int(empty[0])} has no examples to train on: keep at least one")
    return masks.cpu()


def _models(masks: Tensor, seeds: int, seed: int, baseline: int) -> tuple[list[Tensor], list[int]]:
    """The rows and the seed of every model: the subsets', repetitions together, then the baselines'."""
    rows = [mask.nonzero()[:, 0] for mask in masks for _ in range(seeds)]
    rows += [torch.arange(masks.shape[1])] * baseline
    own = [model_seed(seed, s, r, seeds) for s in range(len(masks)) for r in range(seeds)]
    return rows, own + [model_seed(seed, len(masks), b, seeds) for b in range(baseline)]


def _own_models(
    function: OwnTraining, rows: Sequence[Tensor], seeds: Sequence[int], models: Iterable[int], progress: bool
) -> Iterator[tuple[list[int], States]]:
    for i in track(list(models), "training one at a time", enabled=progress):
        with own_randomness(seeds[i]):
            model = function(rows[i].tolist(), seeds[i])
        named = [*model.named_parameters(), *model.named_buffers()]
        yield [i], {name: tensor.detach()[None].clone() for name, tensor in named}


def _check_architecture(task: Task, states: States) -> None:
    """A model that lacks a parameter would be measured with the task model's in its place.

    Raises:
        TaskError: other names or shapes than the task model's.
    """
    own = dict([*task.model.named_parameters(), *task.model.named_buffers()])
    differ = sorted(own.keys() ^ states.keys())
    differ += [name for name in states if name in own and own[name].shape != states[name].shape[1:]]
    if differ:
        raise TaskError(
            f"the trained models are of another architecture than the task's model ({type(task.model).__name__}): "
            f"they differ in {differ[0]!r}"
        )


def _ground_truth(
    masks: Tensor, found: dict[int, dict[str, Tensor]], seeds: int, baseline: int, manifest: dict[str, Any]
) -> GroundTruth:
    m = len(masks)
    measurements, full = {}, {}
    for name in found[0]:
        values = torch.stack([found[i][name] for i in range(m * seeds + baseline)])
        measurements[name] = values[: m * seeds].unflatten(0, (m, seeds)).contiguous()
        full[name] = values[m * seeds :].contiguous()
    return GroundTruth(masks, measurements, full if baseline else None, manifest)
