"""How a model is trained: the optimiser, its step, the batches, and for how long."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

from refluence.errors import DataError

OptimizerName = Literal["sgd", "adam", "adamw"]
ScheduleName = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True)
class Recipe:
    """Mini-batch training on the mean of per-example losses + (l2/2)·‖θ‖², reshuffled every epoch.

    A short last batch is kept.

    Args:
        learning_rate: the step η at its highest.
        epochs: passes over the rows.
        batch_size: rows a step.
        optimizer: "sgd", "adam" (Kingma & Ba 2015) or "adamw" (Loshchilov & Hutter 2019).
        momentum: of "sgd", heavy ball.
        betas, epsilon: of "adam" and "adamw".
        l2: weight decay of the objective, added to the gradient.
        weight_decay: of "adamw": θ shrinks by η·weight_decay a step, which is no part of an objective.
        schedule: "constant", or from η to final_share·η along a "cosine" or a "linear" ramp over all steps.
        final_share: where the schedule ends.
        warmup: steps in which η grows from 0 to its height.
        clip: largest norm of a step's gradient over all parameters; None: not clipped.
        steps: stop after so many steps instead of `epochs`.

    Raises:
        DataError: a number out of its range, or a setting of another optimiser.
    """

    learning_rate: float
    epochs: int
    batch_size: int
    optimizer: OptimizerName = "sgd"
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    l2: float = 0.0
    weight_decay: float = 0.0
    schedule: ScheduleName = "constant"
    final_share: float = 0.0
    warmup: int = 0
    clip: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "batch_size"):
            if not getattr(self, name) > 0:
                raise DataError(f"{name} of a Recipe must be positive, not {getattr(self, name)!r}")
        for name in ("momentum", "l2", "weight_decay", "warmup", "final_share"):
            if not getattr(self, name) >= 0:
                raise DataError(f"{name} of a Recipe must be at least 0, not {getattr(self, name)!r}")
        if self.optimizer not in ("sgd", "adam", "adamw"):
            raise DataError(f'optimizer must be "sgd", "adam" or "adamw", not {self.optimizer!r}')
        if self.schedule not in ("constant", "cosine", "linear"):
            raise DataError(f'schedule must be "constant", "cosine" or "linear", not {self.schedule!r}')
        if self.momentum and self.optimizer != "sgd":
            raise DataError(f'momentum is a setting of "sgd"; {self.optimizer!r} has betas')
        if self.weight_decay and self.optimizer != "adamw":
            raise DataError('weight_decay is a setting of "adamw"; use l2, which is part of the objective')
        for name in ("clip", "steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise DataError(f"{name} of a Recipe must be positive or None, not {value!r}")

    def total_steps(self, rows: int) -> int:
        """Steps of a training on so many rows."""
        return self.steps if self.steps is not None else self.epochs * math.ceil(rows / self.batch_size)

    def step_size(self, step: int, total: int) -> float:
        """η of step 0, 1, … of `total`."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, total - self.warmup)
        match self.schedule:
            case "constant":
                share = 1.0
            case "cosine":
                share = self.final_share + (1 - self.final_share) * (1 + math.cos(math.pi * done)) / 2
            case "linear":
                share = self.final_share + (1 - self.final_share) * (1 - done)
        return self.learning_rate * share

    def describe(self) -> str:
        """The recipe in a few words."""
        name = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}[self.optimizer]
        end = "" if self.schedule == "constant" else f" falling to {self.final_share * self.learning_rate:g}"
        parts = [f"{name} with step {self.learning_rate:g}{end}"]
        parts += [f"momentum {self.momentum:g}"] if self.momentum else []
        parts += [f"l2 {self.l2:g}"] if self.l2 else []
        parts += [f"weight decay {self.weight_decay:g}"] if self.weight_decay else []
        parts += [f"{self.steps:,} steps" if self.steps is not None else f"{self.epochs} epochs"]
        return ", ".join([*parts, f"batch {self.batch_size}"])


def stream(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose (shuffling, wrong labels, ...), so that no two draw the same numbers."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{seed}".encode()).digest()[:6], "big")
