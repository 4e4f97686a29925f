"""What methods are tested on: problem, scores, and the models retrained for it, each trained once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import refluence as rf
from refluence.batches import Batches
from refluence.cli.problem import Problem
from refluence.errors import DataError, TaskError
from refluence.evaluation.ground_truth import GroundTruth
from refluence.evaluation.retraining import retrain
from refluence.task import batch_targets
from refluence.training import Recipe

NO_RECIPE = (
    "models must be retrained, and how is not known: let the function of --task return a refluence.training.Recipe "
    "after (task, train, test), such as Recipe(learning_rate=0.1, epochs=20, batch_size=64)"
)


@dataclass(frozen=True)
class Effort:
    """How much is retrained and removed."""

    subsets: int = 50
    seeds: int = 1
    removals: int = 50
    seed: int = 0
    progress: bool = True


@dataclass(frozen=True)
class Trial:
    """What the tests are made on: the methods with their scores of the reported test rows, and the ground truth.

    `test` and `rows` are all chosen test rows, `reported` the positions in them that are reported.
    """

    problem: Problem
    test: Any
    rows: list[int]
    reported: list[int]
    influences: Mapping[str, rf.Influence]
    scores: Mapping[str, rf.Scores]
    baselines: Mapping[str, rf.Scores]
    folder: Path
    effort: Effort
    pictures: dict[str, Callable[[], Any]] = field(default_factory=dict)

    @property
    def everything(self) -> dict[str, rf.Scores]:
        """The scores of methods and baselines."""
        return {**self.scores, **self.baselines}

    @property
    def measurement(self) -> str:
        """What the scores explain, among what a ground truth measures."""
        return "loss" if self.problem.task.measurement in (None, "loss") else "measurement"

    @property
    def recipe(self) -> Recipe:
        """How models are trained.

        Raises:
            DataError: it is not known.
        """
        if self.problem.recipe is None:
            raise DataError(NO_RECIPE)
        return self.problem.recipe

    @cached_property
    def reported_test(self) -> Any:
        """The reported test rows."""
        return Batches(self.test, name="test data").select(self.reported)

    def half_subsets(self) -> GroundTruth:
        """Models trained on random halves, measured on all chosen test rows; trained once, then read."""
        name = f"halves-{self.effort.subsets}x{self.effort.seeds}-seed-{self.effort.seed}"
        return self._retrained(self.effort.subsets, name)

    def without(self, name: str) -> Callable[[Tensor], GroundTruth]:
        """Masks → models trained on them, measured on the reported rows; each set of masks in a folder of its own."""

        def retrained(masks: Tensor) -> GroundTruth:
            key = hashlib.sha256(np.packbits(masks.numpy()).tobytes()).hexdigest()[:12]
            truth = self._retrained(masks, f"{name}-{key}-x{self.effort.seeds}-seed-{self.effort.seed}")
            return truth.tests(self.reported)

        return retrained

    def _retrained(self, masks: int | Tensor, name: str) -> GroundTruth:
        return retrain(
            self.problem.task,
            self.problem.train,
            self.test,
            masks,
            self.recipe,
            seeds=self.effort.seeds,
            seed=self.effort.seed,
            build=self.problem.build,
            path=self.folder / name,
            progress=self.effort.progress,
        )

    def labels(self) -> tuple[Tensor, Tensor] | None:
        """One integer label for each train and reported test example, where there are such."""
        train, test = labels_of(self.problem.train), labels_of(self.reported_test)
        return None if train is None or test is None else (train, test)


def labels_of(data: Any) -> Tensor | None:
    """One integer label an example (n,), or None where there is no such thing."""
    found = list(_targets(data))
    if not found or any(t is None for t in found):
        return None
    return torch.cat(found)


def _targets(data: Any) -> Iterator[Any]:
    for _, batch in Batches(data, name="data"):
        try:
            targets = batch_targets(batch)
        except TaskError:
            yield None
            return
        single = isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point()
        yield targets.cpu() if single else None
