"""Small models with what is hard to train together, each with data and a task."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import refluence as rf

ROWS = 23


@dataclass
class Case:
    build: Any
    data: Any
    loss: Any = "cross_entropy"
    forward: Any = None

    def task(self):
        torch.manual_seed(1234)
        return rf.Task(self.build(), loss=self.loss, forward=self.forward)


def _generator():
    return torch.Generator().manual_seed(0)


def _vectors(width=6, classes=3):
    generator = _generator()
    inputs = torch.randn(ROWS, width, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, classes, (ROWS,), generator=generator)


def _images():
    generator = _generator()
    inputs = torch.randn(ROWS, 2, 6, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (ROWS,), generator=generator)


def _tokens():
    generator = _generator()
    tokens = torch.randint(0, 11, (ROWS, 5), generator=generator)
    labels = torch.randint(0, 11, (ROWS, 5), generator=generator)
    labels[::3, 2] = -100
    return {"tokens": tokens, "labels": labels}


class Attention(nn.Module):
    """A language model with tied weights: embedding, attention with dropout, layer norm."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.norm(x + mixed))


class FusedAttention(nn.Module):
    """Causal attention by torch's one call."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens):
        q, k, v = self.qkv(self.embedding(tokens)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3 if self.training else 0.0, is_causal=True)
        return self.head(mixed.transpose(1, 2).flatten(-2))


class Noisy(nn.Module):
    """Adds noise in training, which is no dropout."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x + 0.1 * torch.randn_like(x) if self.training else x)


class Branching(nn.Module):
    """Goes one way or the other by a value, which `vmap` cannot follow."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else self.linear(-x)


class PartlyFrozen(nn.Module):
    """Frozen features, different in each model."""

    def __init__(self):
        super().__init__()
        self.features = nn.Linear(6, 8).requires_grad_(False)
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        return self.linear(self.features(x).tanh())


def _mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))


def _norms():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout2d(0.3),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(4, 3),
        nn.BatchNorm1d(3),
    )


def _other_dropouts():
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.SELU(),
        nn.AlphaDropout(0.2),
        nn.Linear(8, 8),
        nn.Dropout(0.4, inplace=True),
        nn.Linear(8, 3),
    )


def _encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.Embedding(11, 8), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))


def _double(build):
    return lambda: build().double()


def _huber(output, batch):
    return F.huber_loss(output[:, 0], batch[2] * batch[1], reduction="none")


CASES = {
    "mlp with dropout": Case(_double(_mlp), _vectors()),
    "convolutions and batch norms": Case(_double(_norms), _images()),
    "other dropouts": Case(_double(_other_dropouts), _vectors()),
    "attention, tied, dict": Case(_double(Attention), _tokens()),
    "fused attention": Case(_double(FusedAttention), _tokens()),
    "partly frozen": Case(_double(PartlyFrozen), _vectors()),
    "encoder, custom forward": Case(
        _double(_encoder), _tokens(), forward=lambda model, batch: model(batch["tokens"]) @ model[0].weight.T
    ),
    "custom loss on three columns": Case(
        _double(lambda: nn.Linear(6, 1)),
        (*_vectors(), torch.linspace(0, 1, ROWS, dtype=torch.float64)),
        loss=_huber,
    ),
}
NOISY = Case(_double(Noisy), _vectors())
BRANCHING = Case(_double(Branching), _vectors())
