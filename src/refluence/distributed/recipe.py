"""What the train side is made of, wherever it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from refluence.batches import Batch, Batches, Data
from refluence.curvature import Curvature
from refluence.curvature.build import make_curvature
from refluence.gradients.capture import Capture
from refluence.gradients.rows import GradientRows
from refluence.settings import Settings, working_model
from refluence.skipping import replaced
from refluence.store.held import Earlier
from refluence.store.keeping import Keeping

Rows = tuple[int, int]
"""First row, and the one after the last."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """All that decides the gradients and the curvature of the train side.

    Args:
        settings: what was asked for.
        data: the data set, or a function that loads it.
        probe: rows that decide how gradients are made.
        batch_size: examples a forward pass.
        weights: of all examples in the training objective; None: all 1.
        q: rows of the curvature for each example; None: known by products only.
        skipped: rows that are left out.
        stored: the fingerprint of the gradients in a store; None: they are held where they are made.
        share: of the memory for kept gradients that is for those of the loss.
        whole: whether whole gradients are held and stored, as the execution asks.
        keeps: whether gradients are worth keeping for further passes.
        earlier: what this process knows of the store (`HeldRows`).
    """

    settings: Settings
    data: Data
    probe: Batch
    batch_size: int
    weights: Tensor | None
    q: int | None
    skipped: Mapping[int, str]
    stored: Mapping[str, Any] | None
    share: float
    whole: bool = False
    keeps: bool = True
    earlier: dict[str, Earlier] = field(default_factory=dict)

    def on(self, device: torch.device | str | None) -> Recipe:
        """The same, to be made on a device."""
        return replace(self, settings=replace(self.settings, device=device))

    def capture(self) -> Capture:
        """What makes the gradients, on the device of the settings."""
        settings = self.settings
        model = working_model(settings)
        device = next(model.parameters()).device
        rows = Batches(self.probe, None, device, settings.dtype, "train")
        return Capture(settings.task, model, settings.groups, rows)

    def batches(self, device: torch.device) -> Batches:
        """All the data in batches."""
        data = Batches(loaded(self.data), self.batch_size, device, self.settings.dtype, "train")
        return replaced(data, self.skipped)

    def curvature(self, capture: Capture, batches: Batches, memory: float) -> Curvature:
        """The curvature of the data, or of a stretch of it, with its share of the mean.

        Args:
            memory: bytes of gradients that may be kept, with those that are held where they are made.
        """
        settings, here = self.settings, slice(batches.first, batches.first + batches.n)
        keeping = None
        if self.stored is not None:
            by_size = settings.accuracy is not None
            seed = settings.seed if settings.curvature == "mc_fisher" else None
            about = {"name": settings.curvature, "rows an example": self.q, "seed": seed}
            keeping = Keeping(settings.execution, self.stored, about, by_size, self.whole, self.earlier)
        own = int(memory * self.share)
        rows = GradientRows(capture, batches, capture.loss, own, settings.progress, keeping=keeping)
        if self.whole and not settings.execution.elsewhere(rows.device):
            memory = max(0.0, memory - rows.matrix_bytes)
        weights = None if self.weights is None else self.weights[here]
        return make_curvature(settings.curvature, rows, weights, self.q, int(memory) - own, settings.seed)


def loaded(data: Data) -> Data:
    """The data set, from the function that loads it where it is one."""
    return data() if is_loader(data) else data


def is_loader(data: Data) -> bool:
    """Whether it is a function without arguments that gives the data set, and no data set itself."""
    return callable(data) and not hasattr(data, "__getitem__") and not hasattr(data, "__iter__")


def stretches(n: int, batch_size: int, rows: int) -> list[Rows]:
    """The rows in stretches of so many or a few more, each of whole batches; the last may be smaller."""
    size = max(1, -(-rows // batch_size)) * batch_size
    return [(first, min(first + size, n)) for first in range(0, n, size)]


Load = Callable[[], Data]
