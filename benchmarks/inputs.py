"""The inputs that every worker loads: the first MNIST images and one trained network, saved once for all libraries."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from refluence.zoo.models import build_model


@dataclass(frozen=True)
class Inputs:
    """A trained classifier in eval mode, its train rows and its test rows."""

    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def first(self, n_train: int, n_test: int) -> Inputs:
        """The first rows, with a copy of the model: some libraries change the one that they are given."""
        (x, y), (x_test, y_test) = self.train, self.test
        model = copy.deepcopy(self.model)
        return Inputs(model, (x[:n_train], y[:n_train]), (x_test[:n_test], y_test[:n_test]))

    def datasets(self) -> tuple[TensorDataset, TensorDataset]:
        return TensorDataset(*self.train), TensorDataset(*self.test)


def mlp() -> nn.Module:
    """The published MNIST network, 784-128-64-10: 109,386 parameters."""
    return build_model("mnist", "mlp")


def small_mlp() -> nn.Sequential:
    """A network of 3,930 parameters on 10 × 10 images, small enough for a dense float64 curvature."""
    return nn.Sequential(nn.Flatten(), nn.Linear(100, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))


def load(folder: Path) -> Inputs:
    """The inputs that `benchmarks.workers.prepare` saved; images (n, 1, 28, 28), labels (n,)."""
    saved = torch.load(folder / "inputs.pt", weights_only=True)
    model = mlp()
    model.load_state_dict(saved["model"])
    return Inputs(model.eval(), tuple(saved["train"]), tuple(saved["test"]))


def load_small(folder: Path) -> Inputs:
    """The first 1,000 train and 100 test images at 10 × 10 pixels and a network trained on them, in float64."""
    full = load(folder)
    train, test = (
        (F.adaptive_avg_pool2d(images[:rows], 10).double(), labels[:rows])
        for (images, labels), rows in ((full.train, 1000), (full.test, 100))
    )
    torch.manual_seed(0)
    model = small_mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(20):
        for rows in torch.randperm(len(train[0])).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(train[0][rows]), train[1][rows]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return Inputs(model.eval(), train, test)
