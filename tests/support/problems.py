"""Tiny models of every architecture with train and test data, and the dense references of what attribution gives."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import refluence as rf
from refluence.curvature.outputs import sampled_gradients
from support.curvatures import DenseReference, block_diagonal
from support.reference import columns_of, loop_gradients

N, K = 11, 4
SAMPLES = 2
SEED = 5
CLASSES = 3


class Transformer(nn.Module):
    """Embedding, attention, LayerNorm; the mean over positions is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, 0.1, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.tokens(tokens)).mean(dim=1))


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(4, 3), nn.LayerNorm(3), nn.Linear(3, 4)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens).cumsum(dim=1)).tanh())


class Nested(nn.Module):
    """Modules within modules, and parameters that the root owns."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(()))
        self.body = nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), nn.Tanh())
        self.head = nn.Linear(3, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x * self.scale)) + self.shift * x[:, :CLASSES]


def _mlp(bias: bool = True, frozen: bool = False) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, CLASSES, bias=bias))
    model[0].requires_grad_(not frozen)
    return model


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 2, 2),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


def _vectors(n: int) -> Tensor:
    return torch.randn(n, 4, dtype=torch.float64)


def _classes(n: int) -> Tensor:
    return torch.randint(CLASSES, (n,))


MODELS: dict[str, tuple[Any, str, Any]] = {
    "mlp": (_mlp, "cross_entropy", lambda n: (_vectors(n), _classes(n))),
    "mlp without bias": (lambda: _mlp(bias=False), "mse", lambda n: (_vectors(n), torch.randn(n, CLASSES).double())),
    "cnn": (_cnn, "cross_entropy", lambda n: (torch.randn(n, 2, 5, 6).double(), _classes(n))),
    "transformer": (Transformer, "cross_entropy", lambda n: (torch.randint(5, (n, 4)), _classes(n))),
    "frozen": (
        lambda: _mlp(frozen=True),
        "binary_cross_entropy",
        lambda n: (_vectors(n), torch.randint(2, (n, CLASSES))),
    ),
    "tied": (Tied, "cross_entropy", lambda n: (torch.randint(4, (n, 3)), torch.randint(4, (n, 3)))),
    "nested": (Nested, "cross_entropy", lambda n: (_vectors(n), _classes(n))),
}


class Problem:
    """A model with N train and K test examples, and dense references of it."""

    def __init__(self, name: str, weighted: bool = False) -> None:
        make, self.loss, data = MODELS[name]
        self.name = name
        with torch.random.fork_rng():
            torch.manual_seed(sum(map(ord, name)))
            self.model: nn.Module = make().double()
            for parameter in self.model.parameters():
                # zero biases and unit scales would hide a term that multiplies them
                parameter.data += 0.3 * torch.randn_like(parameter)
            self.train, self.test = data(N), data(K)
            weights = 2 * torch.rand(N, dtype=torch.float64)
        weights[::5] = 0
        self.weights = weights if weighted else None
        self.names = [n for n, p in self.model.named_parameters() if p.requires_grad]

    def task(self, **options: Any) -> rf.Task:
        """What is differentiated."""
        return rf.Task(self.model, loss=self.loss, **options)

    def blocks(self, structure: str) -> Any:
        """What `rf.Influence` takes: a word, or for "dict" every other parameter in one of two blocks."""
        if structure != "dict":
            return structure
        return {"even": self.names[::2], "odd": self.names[1::2]}

    def groups(self, structure: str) -> dict[str, list[str]]:
        """Block → parameters."""
        if structure == "full":
            return {"full": self.names}
        if structure == "parameter":
            return {name: [name] for name in self.names}
        if structure == "dict":
            return dict(self.blocks(structure))
        found: dict[str, list[str]] = {}
        for name in self.names:
            found.setdefault(name.rpartition(".")[0] or "(root)", []).append(name)
        return found

    def columns(self, structure: str) -> dict[str, Tensor]:
        """Block → its columns."""
        groups = self.groups(structure)
        return dict(zip(groups, columns_of(self.model, self.names, groups.values()), strict=True))

    @cached_property
    def reference(self) -> DenseReference:
        """Derivatives on the train data."""
        labels = None
        if self.loss in ("cross_entropy", "binary_cross_entropy", "mse"):
            labels = self._sampled_labels()
        return DenseReference(self.model, self.names, self.loss, self.train, self.weights, labels)

    def _sampled_labels(self) -> Tensor:
        """The labels that the library draws, read from its gradients in the output; nothing else is taken of it."""
        with torch.no_grad():
            output = self.model.eval()(self.train[0])
        slopes = sampled_gradients(self.task(), output, self.train, 0, SAMPLES, SEED) * SAMPLES**0.5
        if self.loss == "cross_entropy":
            return slopes.argmin(dim=-1)
        if self.loss == "binary_cross_entropy":
            return (slopes < 0).long()
        return output[:, None] - slopes * output[0].numel() / 2

    @cached_property
    def test_gradients(self) -> Tensor:
        """(K, d)."""
        losses = self.reference.losses
        return loop_gradients(self.model, lambda m, part: losses(m(part[0]), part), self.names, self.test)

    @lru_cache  # noqa: B019
    def curvature(self, name: str) -> Tensor:
        """The whole C."""
        return self.reference.curvature(name)

    def curvatures(self, name: str, structure: str) -> dict[str, Tensor]:
        """Block → C_b."""
        columns = self.columns(structure)
        return dict(zip(columns, block_diagonal(self.curvature(name), list(columns.values())), strict=True))

    def expected(self, structure: str, inverses: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(scores, self-influence, inverse-Hessian-vector products) of one inverse a block."""
        G, V, w = self.reference.gradients, self.test_gradients, self.reference.w
        scores, own, products = torch.zeros(K, N).double(), torch.zeros(N).double(), torch.zeros_like(V)
        for block, columns in self.columns(structure).items():
            H = inverses[block]
            scores += V[:, columns] @ H @ G[:, columns].T
            own += ((G[:, columns] @ H) * G[:, columns]).sum(dim=1)
            products[:, columns] = V[:, columns] @ H.T
        return scores * w, own * w, products


@lru_cache
def problem(name: str, weighted: bool = False) -> Problem:
    """Made once."""
    return Problem(name, weighted)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-8) -> None:
    """All entries, to `rtol` of the largest."""
    assert found.shape == expected.shape
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=rtol * scale + 1e-300)


def damped(C: Tensor, shift: float) -> Tensor:
    """C + μI."""
    return C + shift * torch.eye(len(C), dtype=C.dtype)


__all__ = ["MODELS", "SAMPLES", "SEED", "K", "N", "Problem", "close", "damped", "problem"]
