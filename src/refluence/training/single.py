"""One model, trained by a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from refluence.batches import Data
from refluence.errors import DataError
from refluence.progress import track
from refluence.task import Task
from refluence.training.examples import Examples
from refluence.training.fresh import fresh_model
from refluence.training.optimizers import Updates, objective_l2
from refluence.training.randomness import Draws, OwnDropout
from refluence.training.recipe import Recipe, stream

SMALL_STEP = 1 << 26


def train(
    task: Task,
    data: Data,
    recipe: Recipe,
    *,
    build: Callable[[], nn.Module] | None = None,
    rows: Sequence[int] | Tensor | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """A new model trained on mean loss + (l2/2)·‖θ‖², in eval mode.

    Initialisation draws from the global random state at this seed, shuffling and dropout from streams of their own
    (`stream(seed, "shuffle")`, `Draws`), all on the CPU whatever the device: the same seed gives the same model on the
    same machine, to rounding on any. The task's model and the global random state are left as they were.

    Args:
        task: what is trained: the loss, the forward pass and, for `build=None`, the architecture.
        data: the examples, as `Influence.fit` takes them.
        recipe: how it is trained. Its l2 and the task's are the same thing, given in one place or alike in both.
        build: makes an untrained model from the global random state; None: a `fresh_model` of the task's.
        rows: the examples trained on; None: all.
        seed: of everything random.
        progress: show how far it is.

    Raises:
        DataError: two different l2, no rows or rows that do not exist, or data that cannot be read.
        TaskError: a model that cannot be drawn anew.
    """
    device = next(task.model.parameters()).device
    examples = Examples(data, device)
    chosen = torch.arange(examples.n) if rows is None else checked_rows(rows, examples.n, "the model")
    return train_on(task, examples, chosen, recipe, build=build, seed=seed, progress=progress)


def train_on(
    task: Task,
    examples: Examples,
    rows: Tensor,
    recipe: Recipe,
    *,
    build: Callable[[], nn.Module] | None,
    seed: int,
    progress: bool,
) -> nn.Module:
    """`train` on data that are already read."""
    device = next(task.model.parameters()).device
    with own_randomness(seed), torch.enable_grad():
        model = initial_model(task, build, device)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        total = recipe.total_steps(len(rows))
        updates = Updates(parameters, recipe, objective_l2(task, recipe), total, stacked=False)
        dropout = OwnDropout(Draws(seed))
        weights = sum(parameter.numel() for parameter in parameters)
        with few_threads(weights * recipe.batch_size):
            for batch in track(batches_of([rows], recipe, [seed]), "training", total=total, enabled=progress):
                values = examples.batch(batch[0])
                # Fused attention would draw its dropout itself.
                with dropout(), sdpa_kernel(SDPBackend.MATH):
                    loss = task.losses(task.output(model, values), values).mean()
                updates.apply(torch.autograd.grad(loss, parameters, materialize_grads=True))
    return model.eval()


def checked_rows(rows: Sequence[int] | Tensor, n: int, which: str) -> Tensor:
    """Row numbers as integers on the CPU.

    Raises:
        DataError: none, one that does not exist, or booleans.
    """
    given = torch.as_tensor(rows).cpu()
    if given.numel() == 0:
        raise DataError(f"{which} has no rows to be trained on: keep at least one")
    if given.ndim != 1 or given.dtype == torch.bool or given.is_floating_point():
        raise DataError(
            f"the rows of {which} are {given.dtype} {tuple(given.shape)}: give row numbers, such as "
            "mask.nonzero()[:, 0] of a boolean mask"
        )
    outside = given[(given < 0) | (given >= n)]
    if len(outside):
        raise DataError(f"{which} asks for row {int(outside[0])}, but the train data has rows 0 to {n - 1}")
    return given.long()


def initial_model(task: Task, build: Callable[[], nn.Module] | None, device: torch.device) -> nn.Module:
    """An untrained model in train mode, drawn from the global random state on the CPU, on a device."""
    if build is not None:
        return build().to(device).train()
    return fresh_model(task.model).train()


def batches_of(rows: Sequence[Tensor], recipe: Recipe, seeds: Sequence[int], first: int = 0) -> Iterator[Tensor]:
    """The rows (m, b) of every step from `first` on for m models on as many rows each.

    Each has a new order each epoch, and a short batch last.
    """
    shuffles = [torch.Generator().manual_seed(stream(seed, "shuffle")) for seed in seeds]
    n = len(rows[0])
    total, step = recipe.total_steps(n), 0
    while step < total:
        orders = [own[torch.randperm(n, generator=shuffle)] for own, shuffle in zip(rows, shuffles, strict=True)]
        for batch in torch.stack(orders).split(recipe.batch_size, dim=1):
            if first <= step < total:
                yield batch
            step += 1


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """The CPU's global random state seeded, and given back afterwards; the accelerators' is not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def few_threads(work: int) -> Iterator[None]:
    """One thread for small steps, which are about as quick on it, and many times quicker where cores are shared."""
    threads = torch.get_num_threads()
    if work < SMALL_STEP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
