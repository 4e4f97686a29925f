"""Does training on the examples that a method names help the test example? One step, measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from refluence.batches import Batches, Data
from refluence.errors import DataError
from refluence.evaluation.bootstrap import RESAMPLES, mean_estimate
from refluence.evaluation.estimate import Estimate
from refluence.evaluation.lds import row_ids
from refluence.progress import track
from refluence.scores import Scores
from refluence.task import Task
from refluence.training import stream

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def tail_patch(
    task: Task,
    scores: Scores | Tensor,
    train: Data,
    test: Data,
    *,
    k: int = 10,
    learning_rate: float = 1e-3,
    optimizer: OptimizerFactory | None = None,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> Estimate:
    """The tail-patch score f_i(θ) − f_i(θ'_i), mean over tests: θ'_i is θ after one step on the top-k of test i.

    f is the task's measurement, by default the loss −log p, so that this is the gain in log p. The step is on the mean
    loss of the k examples, in eval mode, on a copy of the model; θ are the attributed parameters.

    Source: Chang et al. 2024 (TrackStar).

    Args:
        task: the trained model.
        scores: of these test and train rows, positive = helpful.
        train, test: the data.
        k: train examples in the step.
        learning_rate: of one step of gradient descent.
        optimizer: parameters → an optimiser to use instead, such as the one of the training.
        resamples, confidence: of the bootstrap over tests.
        seed: of the bootstrap and of the random examples.
        progress: whether a bar is shown.

    Returns:
        The estimate; `details` has one row a test: test, change, random (the same after a step on k random examples).

    Raises:
        DataError: scores of another shape than the data, or k outside 1…n.
    """
    model = copy.deepcopy(task.model).eval()
    device = next(model.parameters()).device
    trains, tests = Batches(train, device=device, name="train data"), Batches(test, device=device, name="test data")
    values = (scores.values if isinstance(scores, Scores) else scores).detach().cpu()
    if tuple(values.shape) != (tests.n, trains.n):
        raise DataError(
            f"the scores have shape {tuple(values.shape)}, the data {tests.n} test and {trains.n} train examples"
        )
    if not 1 <= k <= trains.n:
        raise DataError(f"k must be from 1 to the {trains.n} train examples, not {k}")
    chosen = values.topk(k, dim=1).indices
    generator = np.random.default_rng(stream(seed, "random proponents"))
    patch = _Patch(task, model, optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=learning_rate)))
    changes = torch.empty(tests.n, 2, dtype=torch.float64)
    for i in track(range(tests.n), "tail-patch", enabled=progress):
        before = patch.measured(tests, i)
        drawn = generator.choice(trains.n, k, replace=False)
        for column, rows in enumerate((chosen[i].tolist(), drawn.tolist())):
            with patch.stepped(trains, rows):
                changes[i, column] = before - patch.measured(tests, i)
    estimate = mean_estimate("tail_patch", changes[:, 0], resamples=resamples, confidence=confidence, seed=seed)
    details = pd.DataFrame(
        {"test": row_ids(scores, tests.n), "change": changes[:, 0].numpy(), "random": changes[:, 1].numpy()}
    )
    return Estimate(estimate.name, estimate.value, estimate.low, estimate.high, confidence, details)


class _Patch:
    """A copy of the model whose attributed parameters take one step and come back."""

    def __init__(self, task: Task, model: nn.Module, optimizer: OptimizerFactory) -> None:
        self.task, self.model, self.optimizer = task, model, optimizer
        names = set(task.parameter_names())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.start = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def measured(self, tests: Batches, row: int) -> float:
        batch = tests.select([row])
        with torch.random.fork_rng(devices=[]):
            return self.task.measurements(self.task.output(self.model, batch), batch).item()

    @contextmanager
    def stepped(self, trains: Batches, rows: Sequence[int]) -> Iterator[None]:
        batch = trains.select(rows)
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            loss = self.task.losses(self.task.output(self.model, batch), batch).mean()
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer(self.parameters).step()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, self.start, strict=True):
                    parameter.copy_(value)
