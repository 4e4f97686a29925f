"""Networks trained on the selections: a small one for every arm together, the embedding's architecture for a few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from refluence.batches import Batch
from refluence.studies.folder import Stage, StudyFolder
from refluence.studies.leverage_basis.arms import Arm, Chooser
from refluence.studies.leverage_basis.images import Images
from refluence.studies.leverage_basis.networks import (
    BATCH,
    CLASSES,
    LEARNING_RATE,
    accuracy,
    side_by_side,
    steps_on,
    trained,
    untrained,
)
from refluence.studies.leverage_basis.options import Options
from refluence.task import Task
from refluence.training import Recipe, train_together

NETWORK, CONVOLUTIONAL = "network", "convolutional"
CONVOLUTIONAL_ARMS = ("random", "raw_top", "regression_top")

Job = tuple[Arm, int]


def small_network(side: int, hidden: int) -> nn.Module:
    """Pixels, a hidden layer with ReLU, one output a class."""
    return nn.Sequential(nn.Flatten(), nn.Linear(side * side, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


def weighted_loss(output: Float[Tensor, "n c"], batch: Batch) -> Float[Tensor, " n"]:
    """Cross-entropy times the example's weight."""
    return F.cross_entropy(output, batch[1], reduction="none") * batch[2]


def early_models(images: Images, options: Options, path: Path, progress: bool) -> list[nn.Module]:
    """Small networks after a few epochs on all train rows, for EL2N and GraNd."""
    task = Task(small_network(images.side, options.hidden))
    recipe = Recipe(LEARNING_RATE, options.early_epochs, BATCH, optimizer="adam")
    rows = [torch.arange(images.n_train)] * options.early_models
    seeds = range(1, options.early_models + 1)
    found: dict[int, nn.Module] = {}
    for models, states in train_together(task, images.train, rows, list(seeds), recipe, path=path, progress=progress):
        for place, i in enumerate(models):
            found[i] = _module(images, options, states, place)
    return [found[i] for i in range(options.early_models)]


def network_results(
    images: Images,
    chooser: Chooser,
    options: Options,
    arms: Sequence[Arm],
    k: int,
    path: Path,
    progress: bool,
) -> list[dict[str, Any]]:
    """One record an arm and seed of the small network on k selected rows, all trained together.

    Rows with weights of their own are added to the data as copies, so that one data set serves every model.
    """
    jobs: list[Job] = []
    rows, copies, weights = [], [], [torch.ones(images.n_train)]
    size = images.n_train
    for arm in arms:
        for seed in range(1, options.seeds + 1):
            if (found := chooser.rows(arm, k, seed)) is None:
                continue
            jobs.append((arm, seed))
            if arm.weighted:
                copies.append(found[0])
                weights.append(found[1].float())
                rows.append(torch.arange(size, size + k))
                size += k
            else:
                rows.append(found[0])
    x, y = images.train
    if copies:
        copied = torch.cat(copies)
        x, y = torch.cat([x, x[copied]]), torch.cat([y, y[copied]])
    data = (x, y, torch.cat(weights))
    task = Task(small_network(images.side, options.hidden), loss=weighted_loss)
    recipe = Recipe(LEARNING_RATE, 1, BATCH, optimizer="adam", steps=options.steps)
    seeds = [seed for _, seed in jobs]
    records: dict[int, dict[str, Any]] = {}
    for models, states in train_together(task, data, rows, seeds, recipe, path=path, progress=progress):
        for place, i in enumerate(models):
            model = _module(images, options, states, place)
            chosen = (x[rows[i]], y[rows[i]])
            records[i] = _record(NETWORK, jobs[i], k, accuracy(model, chosen), accuracy(model, images.test))
    return [records[i] for i in range(len(jobs))]


def convolutional_results(
    folder: StudyFolder, images: Images, chooser: Chooser, options: Options, arms: Sequence[Arm], progress: bool
) -> dict[str, Stage]:
    """One stage, with one record, an arm, size and seed of the embedding's architecture."""
    jobs: dict[str, Callable[[], Stage]] = {}
    for arm in (arm for arm in arms if arm.name in CONVOLUTIONAL_ARMS):
        for k in options.convolutional_sizes:
            for seed in range(1, options.seeds + 1):
                if (found := chooser.rows(arm, k, seed)) is None:
                    continue
                start = untrained(options, images.side, seed)

                def work(
                    job: Job = (arm, seed), k: int = k, rows: Int64[Tensor, " k"] = found[0], start: Any = start
                ) -> tuple[dict[str, Tensor], dict[str, Any]]:
                    steps = steps_on(k, options.convolutional_steps)
                    model = trained(
                        start, images, job[1], "cross_entropy", epochs=options.epochs, steps=steps, rows=rows
                    )
                    x, y = images.train
                    fits = accuracy(model, (x[rows], y[rows]))
                    return {}, {"record": _record(CONVOLUTIONAL, job, k, fits, accuracy(model, images.test))}

                name = f"{CONVOLUTIONAL}/{arm.name}_{k}_{seed}"
                jobs[name] = partial(folder.stage, name, work)
    stages = side_by_side(list(jobs.values()), "convolutional networks on selections", progress)
    return dict(zip(jobs, stages, strict=True))


def _record(model: str, job: Job, k: int, train: float, test: float) -> dict[str, Any]:
    arm, seed = job
    return {
        "model": model,
        "basis": "",
        "group": "",
        "arm": arm.name,
        "k": k,
        "seed": seed,
        "train_accuracy": train,
        "test_accuracy": test,
    }


def _module(images: Images, options: Options, states: dict[str, Tensor], place: int) -> nn.Module:
    model = small_network(images.side, options.hidden)
    model.load_state_dict({name: tensor[place] for name, tensor in states.items()})
    return model.eval()
