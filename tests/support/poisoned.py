"""A data set with examples that cannot be used, a network that fails on some, and dense references without them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import refluence as rf
from support.curvatures import DenseReference
from support.reference import loop_gradients

N, K, BATCH, CLASSES = 23, 4, 4, 3
UNKNOWN = 99.0
KINDS = ("loss", "gradient", "model", "label", "reading")
"""NaN in the input; a gradient that is NaN where the loss is not; a model, or a loss, that raises; no file."""
IN_EVERY_BATCH = {0: "gradient", 1: "loss", 2: "model", 6: "label", 9: "loss", 10: "loss", 14: "gradient", 22: "model"}
REASONS = {
    "loss": "the loss is nan",
    "gradient": "the gradient with respect to layer.weight has NaN or Inf",
    "model": "the model or the loss raises LookupError: no such word",
    "label": "the model or the loss raises RuntimeError: index 7 is out of bounds",
    "reading": "reading it raises FileNotFoundError: no file",
}


class Words(nn.Module):
    """√y² of a linear layer, whose gradient is NaN at zero; some inputs are unknown."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layer, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, CLASSES)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if bool((x == UNKNOWN).any()):
            raise LookupError("no such word")
        return self.head(self.layer(x).square().sqrt())


class Files(Dataset):
    """Rows, some of which have no file."""

    def __init__(self, data: tuple[Tensor, Tensor], missing: set[int]) -> None:
        self.data, self.missing = data, missing

    def __len__(self) -> int:
        return len(self.data[1])

    def __getitem__(self, row: int) -> tuple[Tensor, ...]:
        if row in self.missing:
            raise FileNotFoundError("no file")
        return tuple(part[row] for part in self.data)


def clean(n: int = N, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Rows that are all good."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(100, 4, generator=generator, dtype=torch.float64)
    return x[:n], torch.randint(CLASSES, (100,), generator=generator)[:n]


def poisoned(bad: dict[int, str], data: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The same with these rows spoiled, but for those that only a data set can withhold."""
    x, y = (part.clone() for part in (data or clean()))
    for row, kind in bad.items():
        if kind == "label":
            y[row] = 7
        elif kind != "reading":
            x[row] = {"loss": torch.nan, "gradient": 0.0, "model": UNKNOWN}[kind]
    return x, y


def files(bad: dict[int, str]) -> Files:
    """The spoiled rows as a data set."""
    return Files(poisoned(bad), {row for row, kind in bad.items() if kind == "reading"})


HOLDERS: dict[str, Any] = {
    "tensors": poisoned,
    "mapping": lambda bad: {"inputs": poisoned(bad)[0], "labels": poisoned(bad)[1]},
    "data set": files,
    "loader": lambda bad: DataLoader(files(bad), batch_size=5),
}


def task(**options: Any) -> rf.Task:
    """What is differentiated, of tuples."""
    return rf.Task(Words(), **options)


class Reference:
    """C and gradients of the rows that are good, with their weights; 1/n counts all rows."""

    def __init__(self, bad: Any, weights: Tensor | None = None) -> None:
        self.model = Words()
        self.names = [name for name, _ in self.model.named_parameters()]
        x, y = clean()
        self.good = torch.tensor([row for row in range(N) if row not in bad])
        w = torch.ones(N, dtype=torch.float64) if weights is None else weights
        self.w = w[self.good]
        self.dense = DenseReference(
            self.model, self.names, "cross_entropy", (x[self.good], y[self.good]), weights=self.w
        )
        self.test = clean(K, seed=2)
        losses = self.dense.losses
        self.V = loop_gradients(self.model, lambda m, part: losses(m(part[0]), part), self.names, self.test)

    def curvature(self, name: str) -> Tensor:
        """(1/n) Σ over the good rows."""
        return self.dense.curvature(name) * len(self.good) / N

    def spread(self, values: Tensor) -> Tensor:
        """Columns of the good rows among all, 0 for the others."""
        out = torch.zeros(*values.shape[:-1], N, dtype=torch.float64)
        out[..., self.good] = values * self.w
        return out

    def scores(self, inverse: Tensor) -> Tensor:
        """(K, N)."""
        return self.spread(self.V @ inverse @ self.dense.gradients.T)

    def self_influence(self, inverse: Tensor) -> Tensor:
        """(N,)."""
        G = self.dense.gradients
        return self.spread(((G @ inverse) * G).sum(dim=1))
