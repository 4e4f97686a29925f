"""A small real fit to report on: logistic regression on half of scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from refluence import Influence, Scores, Task

HOSTILE = "</script></style><script>window.pwned=1</script><img src=x onerror=window.pwned=1>\"'`{{7*7}}\u2028"


@dataclass(frozen=True)
class Fitted:
    influence: Influence
    scores: Scores
    train: Any
    test: Any


def fitted(
    model: nn.Module, train: Any, test: Any, rows: list[int], loss: Any = "cross_entropy", **task: Any
) -> Fitted:
    influence = Influence(Task(model, loss=loss, **task), damping=0.01, progress=False).fit(train)
    return Fitted(influence, influence.score(test).rows(rows), train, test)


def descend(model: nn.Module, loss: Any, steps: int = 150) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="session")
def digits() -> Fitted:
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    torch.manual_seed(0)
    train, test = (x[:400], y[:400].clone()), (x[400:700], y[400:700])
    train[1][:12] = (train[1][:12] + 3) % 10
    model = descend(nn.Linear(64, 10), lambda m: nn.functional.cross_entropy(m(train[0]), train[1]))
    wrong = (model(test[0]).argmax(1) != test[1]).nonzero().flatten().tolist()
    return fitted(model, train, test, [*wrong[:3], *[row for row in range(20) if row not in wrong][:5]])


class BagOfTokens(nn.Module):
    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 4)
        self.head = nn.Linear(4, classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask[..., None]
        return self.head((self.embedding(input_ids) * mask).sum(1) / mask.sum(1))


def texts(n: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 16, (n, 9), generator=generator)
    mask = torch.arange(9) < torch.randint(3, 10, (n, 1), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": (ids[:, 0] > 7).long()}


@pytest.fixture(scope="session")
def bag() -> Fitted:
    torch.manual_seed(0)
    return fitted(BagOfTokens(), texts(30, 0), texts(6, 1), [0, 2, 5])


@pytest.fixture(scope="session")
def make() -> Callable[..., Fitted]:
    """`fitted`, for tests with a model of their own."""
    return fitted


@pytest.fixture(scope="session")
def hostile() -> str:
    """Text that would run, break out or be evaluated if anything forgot to escape it."""
    return HOSTILE
