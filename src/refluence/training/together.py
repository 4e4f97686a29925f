"""Many models of one architecture, trained together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from refluence.batches import Data
from refluence.errors import DataError
from refluence.execution import Execution
from refluence.progress import track
from refluence.task import Task
from refluence.training.callables import callable_digest
from refluence.training.examples import Examples
from refluence.training.group import Group
from refluence.training.grouping import Grouping, choose_groups
from refluence.training.optimizers import objective_l2
from refluence.training.recipe import Recipe
from refluence.training.single import checked_rows, initial_model, own_randomness, train_on
from refluence.training.tracing import CannotTrainTogetherError, Stacked, StackedStep
from refluence.training.trial import bytes_of_a_model, checked_step, laid_out
from refluence.training.workers import run_groups

Build = Callable[[], nn.Module] | None
Trained = tuple[list[int], dict[str, Tensor]]


def train_together(
    task: Task,
    data: Data,
    rows: Sequence[Sequence[int] | Tensor],
    seeds: Sequence[int],
    recipe: Recipe,
    *,
    build: Build = None,
    together: int | None = None,
    memory: int | str | None = None,
    path: str | Path | None = None,
    progress: bool = True,
) -> Iterator[Trained]:
    """Many models, each on its own rows with its own seed, a group at a time as groups finish.

    The model of (rows, seed) is that of `train(task, data, recipe, build=build, rows=rows, seed=seed)` to rounding,
    whatever the others are. Models that `torch.func.vmap` cannot follow are trained one at a time.

    Args:
        task: what is trained.
        data: the examples.
        rows: the rows of each model.
        seeds: of each model.
        recipe: how each is trained.
        build: makes an untrained model; None: a `fresh_model` of the task's.
        together: most models a group; None: as many as memory and caches serve well; 1: one at a time.
        memory: bytes that may be used, or a text such as "8GB"; None: 80 % of what is free.
        path: a folder for the state of unfinished groups, from which the same call goes on after a kill.
        progress: show how far it is.

    Yields:
        The indices of a group's models, and name → (g, ...) of their parameters and buffers.

    Raises:
        DataError: no models, as many seeds as rows are needed, a model without rows, or two different l2.
        TaskError: a model that cannot be drawn anew.
    """
    trainer = Trainer(task, data, rows, seeds, recipe, build=build, together=together, memory=memory)
    return trainer.run(range(len(trainer.grouping.groups)), path=path, progress=progress)


class Trainer:
    """The training of many models, planned: `grouping` says which are trained together, and why; `run` trains them.

    Args and errors are those of `train_together`, and

    Args:
        models: the models that are to be trained; None: all.
        groups: groups of models chosen before, which are kept where models can be trained together.
    """

    def __init__(
        self,
        task: Task,
        data: Data,
        rows: Sequence[Sequence[int] | Tensor],
        seeds: Sequence[int],
        recipe: Recipe,
        *,
        build: Build = None,
        together: int | None = None,
        memory: int | str | None = None,
        models: Sequence[int] | None = None,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._task, self._recipe, self._build = task, recipe, build
        self._l2 = objective_l2(task, recipe)
        self._device = next(task.model.parameters()).device
        self._examples = Examples(data, self._device)
        self._rows = [checked_rows(own, self._examples.n, f"model {i}") for i, own in enumerate(rows)]
        self._seeds = [int(seed) for seed in seeds]
        _check(self._rows, self._seeds, together)
        self._workers = torch.get_num_threads() if self._device.type == "cpu" else 1
        self._steps: dict[tuple[int, int], StackedStep] = {}
        self._strides: dict[str, tuple[int, ...]] | None = None
        chosen = list(range(len(self._rows))) if models is None else list(models)
        self.grouping = self._plan(chosen, groups, together, Execution(memory).budget(self._device))

    def run(self, groups: Sequence[int], *, path: str | Path | None = None, progress: bool = True) -> Iterator[Trained]:
        """Train some of the groups, and yield each when it is finished."""
        if not self.grouping.together:
            return self._one_by_one(groups, progress)
        folder = None if path is None else Path(path)
        parts = [self.grouping.groups[group] for group in groups]
        return run_groups(self._start, parts, self._workers, folder, progress)

    def _one_by_one(self, groups: Sequence[int], progress: bool) -> Iterator[Trained]:
        which = [i for group in groups for i in self.grouping.groups[group]]
        for i in track(which, "training one at a time", enabled=progress):
            model = train_on(
                self._task,
                self._examples,
                self._rows[i],
                self._recipe,
                build=self._build,
                seed=self._seeds[i],
                progress=False,
            )
            named = [*model.named_parameters(), *model.named_buffers()]
            yield [i], {name: tensor.detach()[None] for name, tensor in named}

    def _start(self, models: Sequence[int]) -> Group:
        """A group at its first step."""
        stacked, template = self._initial(models)
        rows, seeds = [self._rows[i] for i in models], [self._seeds[i] for i in models]
        steps = {}
        for length in _batch_lengths(len(rows[0]), self._recipe):
            key = (len(models), length)
            if key not in self._steps:
                batch = self._examples.batch(torch.stack([own[:length] for own in rows]))
                self._steps[key], strides = checked_step(self._task, template, stacked, batch, seeds)
                self._strides = self._strides or strides
            steps[length] = self._steps[key]
        assert self._strides is not None
        return Group(
            list(models), laid_out(stacked, self._laid_out(stacked)), rows, seeds, self._recipe, self._l2, steps,
            self._examples, callable_digest(self._task.loss, self._task.forward, self._build, template),
        )  # fmt: skip

    def _laid_out(self, stacked: Stacked) -> dict[str, tuple[int, ...]]:
        """The strides that suit the gradients, for this number of models."""
        assert self._strides is not None
        return {name: (tensor[0].numel(), *self._strides[name][1:]) for name, tensor in stacked.trained.items()}

    def _initial(self, models: Sequence[int]) -> tuple[Stacked, nn.Module]:
        made = []
        for i in models:
            with own_randomness(self._seeds[i]):
                made.append(initial_model(self._task, self._build, self._device))
        return Stacked.of(made), made[0]

    def _plan(
        self, models: Sequence[int], groups: Sequence[Sequence[int]] | None, together: int | None, memory: int
    ) -> Grouping:
        sizes = {i: len(self._rows[i]) for i in models}
        if together == 1:
            return choose_groups(sizes, 1, 1, "asked for one at a time")
        if self._examples.columns is None:
            return choose_groups(sizes, 1, 1, "the examples are no tensors of one shape that fit in memory")
        with own_randomness(self._seeds[models[0]]):
            model = initial_model(self._task, self._build, self._device)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise DataError("no parameter of the model requires grad, so that there is nothing to train")
        length = _batch_lengths(sizes[models[0]], self._recipe)[0]
        copies = 3 if self._recipe.optimizer == "sgd" else 4
        each = bytes_of_a_model(self._task, model, self._examples.batch(self._rows[models[0]][:length]), copies)
        grouping = choose_groups(
            sizes,
            together,
            self._workers,
            each=each,
            memory=memory,
            cached=self._device.type == "cpu",
        )
        if groups is not None:
            grouping = replace(grouping, groups=tuple(tuple(group) for group in groups))
        try:
            self._start(grouping.groups[0])
        except CannotTrainTogetherError as error:
            return choose_groups(sizes, 1, 1, str(error))
        return grouping


def _batch_lengths(rows: int, recipe: Recipe) -> list[int]:
    """The different lengths of a training's batches, the first one's first."""
    first, last = min(rows, recipe.batch_size), rows % recipe.batch_size
    whole = rows // recipe.batch_size
    reached = last not in (0, first) and recipe.total_steps(rows) > whole
    return [first, last] if reached else [first]


def _check(rows: Sequence[Tensor], seeds: Sequence[int], together: int | None) -> None:
    if len(rows) == 0 or len(rows) != len(seeds):
        raise DataError(f"every model needs rows and a seed; there are {len(rows)} of rows and {len(seeds)} of seeds")
    if together is not None and together < 1:
        raise DataError(f"together must be at least 1 or None, not {together!r}")
