"""What a loss computes with decides whether its gradients may be read."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from refluence.errors import StoreError
from refluence.store.bound import bound_digest
from support.stored import N, data, fitted

WEIGHT = torch.ones(3)


def weighted(output, batch):
    return nn.functional.cross_entropy(output, batch[1], weight=WEIGHT, reduction="none")


def scale():
    return FACTOR


FACTOR = 2.0


def through_a_helper(output, batch):
    return scale() * output.sum(dim=1)


class Loss:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, output, batch):
        return self.factor * output.sum(dim=1)

    def method(self, output, batch):
        return self.factor * output.sum(dim=1)


def closed(value):
    def loss(output, batch):
        return value, output, batch

    return loss


def defaulted(value):
    def loss(output, batch, by=value):
        return by

    return loss


class Criterion(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner = nn.CrossEntropyLoss(reduction="none", **options)

    def forward(self, output, batch):
        return self.inner(output, batch[1])


PAIRS = {
    "closure": (closed(1.0), closed(1.5)),
    "tensor": (closed(torch.ones(2)), closed(torch.tensor([1.0, 1.5]))),
    "array": (closed(np.ones(2)), closed(np.zeros(2))),
    "default": (defaulted(1), defaulted(2)),
    "partial": (partial(weighted, reduction=1), partial(weighted, reduction=2)),
    "object": (Loss(1.0), Loss(2.0)),
    "method": (Loss(1.0).method, Loss(2.0).method),
    "module's buffer": (Criterion(), Criterion(weight=torch.ones(3))),
    "module's number": (Criterion(), Criterion(ignore_index=2)),
    "kind of object": (Loss(1.0), closed(1.0)),
    "word": ("mse", "cross_entropy"),
    "nested": (closed({"a": [1, (2,)]}), closed({"a": [1, (3,)]})),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_bound_value_counts(name):
    one, other = PAIRS[name]
    assert bound_digest(one) == bound_digest(one)
    assert bound_digest(one) != bound_digest(other)


def test_equal_ones_are_equal():
    assert bound_digest(closed(torch.ones(2))) == bound_digest(closed(torch.ones(2)))
    assert bound_digest(Criterion()) == bound_digest(Criterion().eval())
    assert bound_digest(Loss(1.0).method) == bound_digest(Loss(1.0).method)


def test_so_does_what_a_function_or_its_helper_reads_from_the_module(monkeypatch):
    before = bound_digest(through_a_helper)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert bound_digest(through_a_helper) != before


def test_a_circle_ends():
    loss = Loss(1.0)
    loss.itself = loss
    assert bound_digest(loss) == bound_digest(loss)


def test_a_store_is_refused_when_the_class_weights_changed(tmp_path, monkeypatch):
    fitted(data(N), tmp_path, loss=weighted)
    monkeypatch.setitem(globals(), "WEIGHT", torch.tensor([1.0, 1.0, 1.1]))
    with pytest.raises(StoreError, match="another what loss and forward are bound to"):
        fitted(data(N), tmp_path, loss=weighted)
