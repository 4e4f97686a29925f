"""C from weighted Gram matrices of the layers' inputs is the C of dense gradient rows, entry by entry."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import refluence as rf
from refluence.curvature import OuterCurvature, dense_outer

N = 37
CLASSES = 3


def inputs(width: int = 9, seed: int = 0) -> torch.Tensor:
    """Inputs with columns that are zero, constant, zero on the first batches only, and equal to others."""
    x = torch.randn(N, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[:, 2], x[:, 4], x[:20, 5], x[:, 6] = 0.0, -0.4242, 0.0, x[:, 1]
    return x


def labels() -> torch.Tensor:
    return torch.arange(N) % CLASSES


class Swapped(nn.Module):
    """A layer whose bias comes before its weight, so that it is not contiguous in the order of the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, CLASSES)
        self.weight = nn.Parameter(torch.randn(4, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(nn.functional.linear(x, self.weight, self.bias)))


MODELS = {
    "softmax regression": lambda: nn.Linear(9, CLASSES),
    "softmax regression without bias": lambda: nn.Linear(9, CLASSES, bias=False),
    "two layers": lambda: nn.Sequential(nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, CLASSES)),
    "two layers, one biased": lambda: nn.Sequential(nn.Linear(9, 4, bias=False), nn.ReLU(), nn.Linear(4, CLASSES)),
    "parameters out of order": Swapped,
}


def model(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return MODELS[name]().double()


def curvature(task: rf.Task, data: object, name: str = "ggn", **options: object) -> OuterCurvature:
    influence = rf.Influence(task, curvature=name, solver=rf.solvers.Dense(), damping=0.1, progress=False, **options)
    found = influence.fit(data, weights=options.pop("weights", None))._fitted().curvature
    assert isinstance(found, OuterCurvature)
    return found


def from_rows(curvature: OuterCurvature, block: str) -> torch.Tensor:
    """(1/n) Σ w f fᵀ of dense rows."""
    total = 0.0
    for start, blocks in curvature.features:
        rows = blocks[block].dense().double()
        weights = curvature.feature_weights(start, len(rows))
        total = total + rows.T @ (rows if weights is None else rows * weights[:, None])
    return total / curvature.n


def assert_same(curvature: OuterCurvature, rounding: float = 1e-14) -> None:
    for block, matrix in curvature.dense().items():
        expected = from_rows(curvature, block)
        torch.testing.assert_close(matrix, expected, rtol=100 * rounding, atol=rounding * float(expected.abs().max()))
        assert torch.equal(matrix, matrix.T)


@pytest.fixture(autouse=True)
def gram_matrices(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the Gram matrices were taken, of every matrix made; they are, wherever the factors are shared."""
    taken: list[bool] = []
    made = dense_outer.shared_moment

    def noted(*arguments: object) -> torch.Tensor | None:
        found = made(*arguments)
        taken.append(found is not None)
        return found

    monkeypatch.setattr("refluence.curvature.outer.shared_moment", noted)
    monkeypatch.setattr(dense_outer, "shared_is_cheaper", lambda layers, d: True)
    return taken


@pytest.mark.parametrize("blocks", ["full", "module", "parameter"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [N, 7])
def test_is_that_of_dense_rows(name, blocks, batch_size, gram_matrices):
    found = curvature(rf.Task(model(name)), (inputs(), labels()), blocks=blocks, batch_size=batch_size)
    gram_matrices.clear()
    assert_same(found)
    if blocks != "parameter":
        assert all(gram_matrices)


@pytest.mark.parametrize("kind", ["fisher", "true_fisher", "mc_fisher"])
def test_every_curvature_of_rows(kind, gram_matrices):
    found = curvature(rf.Task(model("two layers")), (inputs(), labels()), kind, batch_size=10)
    gram_matrices.clear()
    assert_same(found)
    assert gram_matrices == [True]


@pytest.mark.parametrize("loss", ["mse", "binary_cross_entropy"])
def test_losses_whose_directions_do_not_add_up_to_zero(loss):
    targets = torch.rand(N, CLASSES, dtype=torch.float64).round()
    assert_same(curvature(rf.Task(model("two layers"), loss=loss), (inputs(), targets), batch_size=10))


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_examples(name):
    weights = torch.linspace(0, 3, N)
    task, data = rf.Task(model(name)), (inputs(), labels())
    influence = rf.Influence(task, curvature="ggn", solver=rf.solvers.Dense(), damping=0.1, batch_size=7)
    found = influence.fit(data, weights=weights)._fitted().curvature
    assert found.weights is not None
    assert_same(found)


def test_several_tiles_and_panels(monkeypatch):
    monkeypatch.setattr(dense_outer, "TILE_ROWS", 16)
    monkeypatch.setattr(dense_outer, "PANEL", 3)
    monkeypatch.setattr(dense_outer, "CHUNK_ELEMENTS", 200)
    for name in MODELS:
        assert_same(curvature(rf.Task(model(name)), (inputs(), labels()), batch_size=7))


def test_batches_of_a_loader():
    loader = torch.utils.data.DataLoader(TensorDataset(inputs(), labels()), batch_size=11)
    assert_same(curvature(rf.Task(model("two layers")), loader))


def test_gradients_of_float32_agree_to_the_rounding_of_dense_rows():
    network = model("two layers").float()
    assert_same(curvature(rf.Task(network), (inputs().float(), labels()), batch_size=10), rounding=1e-7)


def test_saturated_probabilities():
    network = model("softmax regression")
    network.weight.data *= 200
    assert_same(curvature(rf.Task(network), (inputs(), labels()), batch_size=10))


def test_convolutions_and_positions_take_dense_rows(gram_matrices):
    images = torch.randn(N, 1, 4, 4, dtype=torch.float64)
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, CLASSES)).double()
    found = curvature(rf.Task(convolution), (images, labels()), batch_size=10)
    gram_matrices.clear()
    assert_same(found)
    assert gram_matrices == [False]


def test_dense_rows_are_taken_where_they_are_less_work(monkeypatch):
    monkeypatch.undo()
    wide, narrow = nn.Linear(1000, 2), nn.Linear(2, 1000)

    def cheaper(layer: nn.Linear, q: int) -> bool:
        rows = torch.empty(q, 1, layer.out_features)
        shared = dense_outer.Shared(rows, torch.empty(1, layer.in_features), bias=True)
        d = sum(parameter.numel() for parameter in layer.parameters())
        return dense_outer.shared_is_cheaper(((shared, ()),), d)

    assert cheaper(wide, 1)
    assert cheaper(wide, 10)
    assert not cheaper(narrow, 1)
    assert cheaper(narrow, 1000)
