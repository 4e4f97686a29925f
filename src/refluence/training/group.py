"""A group of models in training, which can be saved and taken up again at any step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from refluence.training.examples import Examples
from refluence.training.files import read_tensors, write_tensors
from refluence.training.optimizers import Updates
from refluence.training.randomness import Draws
from refluence.training.recipe import Recipe
from refluence.training.single import batches_of
from refluence.training.tracing import Stacked, StackedStep


class Group:
    """Models that take their steps together.

    Args:
        models: their indices among all.
        stacked: their parameters and buffers, which are trained in place.
        rows: each one's rows, as many for all.
        seeds: each one's seed.
        recipe: how they are trained.
        l2: of the objective.
        steps: rows a batch → the traced step.
        examples: the data.
        described: all else that decides the training.
    """

    def __init__(
        self,
        models: list[int],
        stacked: Stacked,
        rows: Sequence[Tensor],
        seeds: Sequence[int],
        recipe: Recipe,
        l2: float,
        steps: Mapping[int, StackedStep],
        examples: Examples,
        described: str,
    ) -> None:
        self.models = models
        self.total = recipe.total_steps(len(rows[0]))
        self._stacked, self._rows, self._seeds, self._recipe = stacked, list(rows), list(seeds), recipe
        self._steps, self._examples = steps, examples
        shapes = [(name, tensor.dtype, tensor.shape) for name, tensor in stacked.states().items()]
        self._described = f"{described}{l2}{shapes}"
        self._draws = [Draws(seed) for seed in seeds]
        self._updates = Updates(list(stacked.trained.values()), recipe, l2, self.total, stacked=True)

    @property
    def done(self) -> int:
        """Steps taken."""
        return self._updates.step

    @property
    def states(self) -> dict[str, Tensor]:
        """Name → (g, ...) of the parameters and buffers."""
        return self._stacked.states()

    def advance(self, after: Callable[[], bool]) -> bool:
        """Take the steps that are left; False when `after` a step said to stop."""
        for rows in batches_of(self._rows, self._recipe, self._seeds, first=self.done):
            _, gradients = self._steps[rows.shape[1]](self._stacked, self._examples.batch(rows), self._draws)
            self._updates.apply(gradients)
            if not after():
                return False
        return True

    @property
    def name(self) -> str:
        """A file name of this group's own: its models, their rows and seeds, the objective, the recipe and the data."""
        parts = (self.models, self._seeds, self._recipe, self._examples.checksum, self._described)
        digest = hashlib.sha256("|".join(map(str, parts)).encode())
        for rows in self._rows:
            digest.update(rows.numpy().tobytes())
        return f"training-{digest.hexdigest()[:16]}.safetensors"

    def save(self, folder: Path) -> None:
        """Write where the training is, in one step."""
        tensors = {f"stacked/{name}": tensor for name, tensor in self._in_training().items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in self._updates.state.items()}
        draws = json.dumps([draw.state for draw in self._draws])
        write_tensors(folder / self.name, tensors, {"step": str(self.done), "draws": draws})

    def resume(self, folder: Path) -> None:
        """Go on from what `save` wrote, where there is a sound file of it."""
        found = read_tensors(folder / self.name)
        if found is None:
            return
        tensors, metadata = found
        with torch.no_grad():
            for name, tensor in self._in_training().items():
                tensor.copy_(tensors[f"stacked/{name}"])
        own = {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith("optimizer/")}
        self._updates.resume(int(metadata["step"]), own)
        for draw, state in zip(self._draws, json.loads(metadata["draws"]), strict=True):
            draw.state = state

    def _in_training(self) -> dict[str, Tensor]:
        return self._stacked.trained | self._stacked.buffers
