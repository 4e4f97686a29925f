"""The network whose hidden layer is a basis, and trainings of several side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from refluence.batches import Batch
from refluence.progress import track
from refluence.studies.leverage_basis.images import Images
from refluence.studies.leverage_basis.options import Options
from refluence.task import Task
from refluence.training import Recipe, stream, train
from refluence.training.single import own_randomness

CLASSES = 10
BATCH, CHUNK = 64, 500
LEARNING_RATE = 1e-3
LONGEST = 15
"""Epochs of a training on a selection, at most: the original's."""
T = TypeVar("T")


class EmbeddingNetwork(nn.Module):
    """Two 3×3 convolutions with ReLU and 2×2 max-pooling, a linear layer with ReLU (the embedding), a linear layer.

    Pooling comes before ReLU: the two commute, and ReLU then has a quarter of the entries.
    """

    def __init__(self, side: int, channels: tuple[int, int], embedding: int) -> None:
        super().__init__()
        first, second = channels
        self.first = nn.Conv2d(1, first, 3, padding=1)
        self.second = nn.Conv2d(first, second, 3, padding=1)
        self.embedding = nn.Linear(second * (side // 4) ** 2, embedding)
        self.head = nn.Linear(embedding, CLASSES)
        # In this layout convolutions of few channels take half the time on a CPU.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def embed(self, images: Float32[Tensor, "n 1 h w"]) -> Float32[Tensor, "n e"]:
        """The hidden layer."""
        x = images.contiguous(memory_format=torch.channels_last)
        for layer in (self.first, self.second):
            x = F.relu(F.max_pool2d(layer(x), 2))
        return F.relu(self.embedding(x.flatten(1)))

    def forward(self, images: Float32[Tensor, "n 1 h w"]) -> Float32[Tensor, "n c"]:
        """One output a class."""
        out: Tensor = self.head(self.embed(images))
        return out


def untrained(options: Options, side: int, seed: int) -> EmbeddingNetwork:
    """The network as it starts from a seed: the same for every way of training it."""
    with own_randomness(stream(seed, "initialisation")):
        return EmbeddingNetwork(side, options.channels, options.embedding)


def one_hot_loss(output: Float[Tensor, "n c"], batch: Batch) -> Float[Tensor, " n"]:
    """Smooth L1 between the outputs and the one-hot labels, the mean over outputs."""
    return F.smooth_l1_loss(output, F.one_hot(batch[1], CLASSES).to(output), reduction="none").mean(dim=1)


def trained(
    start: EmbeddingNetwork,
    images: Images,
    seed: int,
    loss: str | Callable,
    *,
    epochs: int,
    steps: int | None = None,
    rows: Int64[Tensor, " k"] | None = None,
) -> EmbeddingNetwork:
    """`start`, trained by Adam on train rows for epochs or steps, in eval mode.

    Nothing is drawn from the global random state, so that trainings may run side by side.
    """
    recipe = Recipe(LEARNING_RATE, epochs, BATCH, optimizer="adam", steps=steps)
    model = train(
        Task(start, loss=loss), images.train, recipe, build=lambda: start, rows=rows, seed=seed, progress=False
    )
    assert isinstance(model, EmbeddingNetwork)
    return model


def steps_on(k: int, limit: int) -> int:
    """Steps of a training on k rows: `limit`, or the epochs of the original where these are fewer."""
    return min(limit, LONGEST * math.ceil(k / BATCH))


@torch.no_grad()
def embeddings(model: EmbeddingNetwork, inputs: Float32[Tensor, "n 1 h w"]) -> Float32[Tensor, "n e"]:
    """The hidden layer of all images."""
    return torch.cat([model.embed(part) for part in inputs.split(CHUNK)])


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """The share of images whose class has the highest output."""
    right = sum(int((model(x).argmax(dim=1) == y).sum()) for x, y in zip(*(t.split(CHUNK) for t in data), strict=True))
    return right / len(data[1])


def side_by_side(jobs: Sequence[Callable[[], T]], what: str, progress: bool) -> list[T]:
    """Run jobs on as many threads as torch has, each with one: small steps are not shared well between threads."""
    threads = torch.get_num_threads()
    if not jobs:
        return []

    def finished(pool: ThreadPoolExecutor) -> Iterable[None]:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                yield None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        results.extend(future.result() for future in futures)

    results: list[T] = []
    try:
        # The trainings set these for themselves and give them back out of turn.
        with (
            own_randomness(0),
            sdpa_kernel(SDPBackend.MATH),
            ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool,
        ):
            for _ in track(finished(pool), what, total=len(jobs), enabled=progress):
                pass
    finally:
        torch.set_num_threads(threads)
    return results
