"""The output of a named layer: the same rows whatever the batches, and the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import refluence as rf
from refluence.errors import DataError, TaskError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(2 * 4 * 4, 3)
        self.unused = nn.Linear(2, 2)
        self.fails = False

    def forward(self, x):
        hidden = self.encoder(x).flatten(1)
        if self.fails:
            raise RuntimeError("broken")
        return self.head(hidden)


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().train()


X = torch.randn(11, 1, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch_size", [None, 1, 4, 11])
def test_the_output_of_the_layer_in_eval_mode(net, batch_size):
    found = rf.features(net, "encoder.2", (X,), batch_size)
    kept = rf.features(net, "encoder.2", X, batch_size, flatten=False)
    net.eval()
    with torch.no_grad():
        expected = net.encoder[:3](X)
        torch.testing.assert_close(kept, expected)
        torch.testing.assert_close(found, expected.flatten(1))
        torch.testing.assert_close(rf.features(net, "", (X,), batch_size), net(X))


def test_every_kind_of_data(net):
    labels = torch.zeros(11).long()
    expected = rf.features(net, "head", X)
    for data in (
        TensorDataset(X, labels),
        DataLoader(TensorDataset(X, labels), batch_size=3),
        {"x": X, "labels": labels},
    ):
        torch.testing.assert_close(rf.features(net, "head", data), expected)
    torch.testing.assert_close(rf.features(net, "head", X, forward=lambda model, batch: model(batch[0] * 1)), expected)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before(net, fails):
    net.encoder[3].eval()
    net.fails = fails
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            rf.features(net, "encoder", X)
    else:
        assert not rf.features(net, "encoder", X).requires_grad
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in net.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_unknown_layer_is_answered_with_those_of_similar_names(net):
    with pytest.raises(DataError, match=r"Net has no layer 'encoder.22': close to it are encoder.2"):
        rf.features(net, "encoder.22", X)
    with pytest.raises(DataError, match=r"no layer 'zzz': close to it are encoder, encoder.0"):
        rf.features(net, "zzz", X)


def test_layers_that_give_no_rows_are_named(net):
    with pytest.raises(TaskError, match="'unused' does not run"):
        rf.features(net, "unused", X)
    twice = nn.Sequential(layer := nn.Linear(2, 2), layer)
    with pytest.raises(TaskError, match="'0' runs 2 times"):
        rf.features(twice, "0", torch.ones(3, 2))
    recurrent = nn.Sequential(nn.LSTM(2, 3, batch_first=True))
    with pytest.raises(TaskError, match="'0' gives tuple for 4 examples"):
        rf.features(recurrent, "0", torch.ones(4, 5, 2))
    turned = nn.Sequential(nn.Unflatten(0, (1, -1)), nn.Flatten(0, 1))
    with pytest.raises(TaskError, match=r"'0' gives shape \(1, 4, 2\) for 4 examples"):
        rf.features(turned, "0", torch.ones(4, 2))


def test_features_go_straight_into_leverage(net):
    scores = rf.leverage_scores(rf.features(net, "head", X))
    assert scores.rank == 3
