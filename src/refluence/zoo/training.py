"""Seeded training by the published recipes, on the CPU, without touching the user's random state."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from refluence.errors import DataError
from refluence.progress import track
from refluence.zoo.datasets import Pair
from refluence.zoo.models import check_names


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent on mean cross-entropy + (l2/2)·‖θ‖², reshuffled every epoch.

    The step is constant, or with `decay` falls to zero along a cosine, which ends nearer to a stationary point.
    """

    learning_rate: float
    momentum: float
    epochs: int
    batch_size: int
    l2: float = 0.0
    decay: bool = False


_RECIPES: dict[tuple[str, str], Recipe] = {
    ("digits", "mlp"): Recipe(learning_rate=0.1, momentum=0.9, epochs=30, batch_size=64, decay=True),
    ("digits", "lr"): Recipe(learning_rate=0.5, momentum=0.9, epochs=40, batch_size=64, decay=True),
    ("digits", "cnn"): Recipe(learning_rate=0.1, momentum=0.9, epochs=30, batch_size=64, decay=True),
    ("mnist", "mlp"): Recipe(learning_rate=0.01, momentum=0.9, epochs=50, batch_size=64),
    ("mnist", "lr"): Recipe(learning_rate=0.01, momentum=0.0, epochs=20, batch_size=32),
    ("mnist", "cnn"): Recipe(learning_rate=0.05, momentum=0.9, epochs=10, batch_size=64, decay=True),
}


def recipe_for(dataset: str, model: str, *, l2: float = 0.0) -> Recipe:
    """The recipe of a model of the zoo, with this weight decay.

    Raises:
        DataError: the zoo has no such model, or l2 is negative.
    """
    check_names(dataset, model)
    if not l2 >= 0:
        raise DataError(f"l2 must be a number ≥ 0, not {l2!r}")
    return replace(_RECIPES[dataset, model], l2=l2)


def stream(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose (shuffling, wrong labels, ...), so that no two draw the same numbers."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{seed}".encode()).digest()[:6], "big")


def train(
    build: Callable[[], nn.Module], data: Pair, recipe: Recipe, *, seed: int = 0, progress: bool = True
) -> nn.Module:
    """A model from `build`, trained on inputs (n, ...) and labels (n,), in eval mode.

    The same seed gives the same model on the same machine. Initialisation, dropout and shuffling draw from the seed;
    the global random state is afterwards what it was.
    """
    inputs, labels = data
    shuffle = torch.Generator().manual_seed(stream(seed, "shuffle"))
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), _one_thread():
        # not torch.manual_seed, which would reseed the accelerators too
        torch.default_generator.manual_seed(seed)
        model = build().train()
        optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.l2
        )
        steps = recipe.epochs * math.ceil(len(labels) / recipe.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if recipe.decay else None
        for _ in track(range(recipe.epochs), "training", enabled=progress):
            for rows in torch.randperm(len(labels), generator=shuffle).split(recipe.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
                optimizer.step()
                if schedule is not None:
                    schedule.step()
    optimizer.zero_grad()
    return model.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small batches are about as quick on one thread, and many times quicker where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Fit:
    """How well a model in eval mode does on some data: mean cross-entropy and share of right predictions."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(model: nn.Module, data: Pair) -> Fit:
    """Mean cross-entropy and accuracy of a model in eval mode on inputs (n, ...) and labels (n,)."""
    inputs, labels = data
    logits = torch.cat([model(part) for part in inputs.split(1024)])
    return Fit(F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item())
