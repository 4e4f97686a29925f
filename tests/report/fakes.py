"""A small stand-in for the core: exact scores of the empirical Fisher by dense gradients, nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from refluence.batches import Batches
from refluence.task import Task


@dataclass
class FakeScores:
    values: Tensor
    n_train: int
    error: Tensor | None = None
    test_ids: Any = None
    train_ids: Any = None
    manifest: dict[str, Any] = field(default_factory=lambda: {"seed": 0})

    def __post_init__(self) -> None:
        n_test, n_train = self.values.shape
        self.test_ids = np.arange(n_test) if self.test_ids is None else np.asarray(self.test_ids)
        self.train_ids = np.arange(n_train) if self.train_ids is None else np.asarray(self.train_ids)

    @property
    def predicted_loo_change(self) -> Tensor:
        return self.values / self.n_train


class FakeCoverage:
    def __init__(self, task: Task) -> None:
        self.parameters = {name: p.numel() for name, p in task.model.named_parameters()}
        self.attributed = self.total = sum(self.parameters.values())
        self.summary = f"{self.attributed:,} of {self.total:,} parameters attributed"

    def frame(self) -> pd.DataFrame:
        rows = [(name, numel, "outer", True, None) for name, numel in self.parameters.items()]
        return pd.DataFrame(rows, columns=["parameter", "numel", "kind", "attributed", "reason"])


class FakeInfluence:
    """τ = g (GᵀG/n + λ)⁻¹ g′ with per-example gradients of the whole data in one batch."""

    def __init__(self, task: Task, train: Any, damping: float = 1e-2) -> None:
        self.task, self.damping = task, damping
        self.coverage = FakeCoverage(task)
        self.plan = SimpleNamespace(solver="Gram", summary=lambda: "solver Gram\nmemory 12 MB\ntime 1 s")
        self._g = self._gradients(train, list(range(Batches(train).n)))
        self.n_train, self.n_parameters = self._g.shape
        self.gradient_norm = float(self._g.mean(dim=0).norm())
        kernel = self._g @ self._g.T / self.n_train
        self._solved = torch.linalg.solve(kernel + damping * torch.eye(self.n_train, dtype=kernel.dtype), kernel)
        self.effective_dimension = float(self._solved.trace())

    def self_influence(self) -> Tensor:
        return self.n_train * self._solved.diagonal()

    def score(self, test: Any, rows: list[int] | None = None, error: float | None = None) -> FakeScores:
        rows = list(range(Batches(test).n)) if rows is None else rows
        g = self._gradients(test, rows)
        kernel = self._g @ self._g.T / self.n_train + self.damping * torch.eye(self.n_train, dtype=g.dtype)
        values = torch.linalg.solve(kernel, self._g @ g.T).T
        return FakeScores(values, self.n_train, None if error is None else torch.full_like(values, error), rows)

    def _gradients(self, data: Any, rows: list[int]) -> Tensor:
        parameters = {name: p.detach().double() for name, p in self.task.model.named_parameters()}
        model = self.task.model

        def loss(parameters: dict[str, Tensor], row: Any) -> Tensor:
            batch = torch.utils._pytree.tree_map(lambda t: t[None], row)

            def forward(*args: Any, **kwargs: Any) -> Any:
                return functional_call(model, parameters, args, kwargs)

            output = self.task.forward(forward, batch) if self.task.forward else _default(forward, batch)
            return self.task.losses(output, batch)[0]

        batch = Batches(data, dtype=torch.float64).select(rows)
        per_example = vmap(grad(loss), in_dims=(None, 0))(parameters, batch)
        return torch.cat([g.flatten(1) for g in per_example.values()], dim=1)


def _default(forward: Any, batch: Any) -> Any:
    if isinstance(batch, dict):
        return forward(**{key: value for key, value in batch.items() if key != "labels"})
    return forward(batch[0])
