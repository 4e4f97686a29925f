"""Several gradients an example: what they share changes no number, on every model."""

import pytest
import torch

from refluence.batches import Batches
from refluence.curvature.build import feature_rows
from refluence.gradients.capture import Capture
from refluence.gradients.fan import FanBlock
from refluence.gradients.groups import parameter_groups
from refluence.gradients.rows import GradientRows
from support.models import CASES
from support.reference import length, loop_gradients, one_row

Q = 2


def directions(output, start, count):
    """Directions of the output of `count` examples from row `start` on, the same on every batch split."""
    rows = []
    for i in range(start, start + count):
        generator = torch.Generator().manual_seed(i)
        rows.append(torch.randn(Q, *output.shape[1:], generator=generator, dtype=torch.float64))
    return torch.stack(rows).to(output.dtype)


def fans(name, batch_size):
    """[(first row, block)] of the gradients along random directions of the output."""
    task, batch = CASES[name].task(), CASES[name].build()[1]
    groups = parameter_groups(task.model, task.parameter_names(), "full")
    batches = Batches(batch, batch_size)
    capture = Capture(task, task.model, groups, batches)
    rows = GradientRows(capture, batches, capture.loss, 1 << 30, progress=False)
    features = feature_rows(rows, lambda out, _, start: directions(out, start, out.shape[0]), Q, 1 << 30)
    return [(start, blocks["full"]) for start, blocks in features]


def one_by_one(name, start, count):
    """The same gradients by a loop, those of the first direction before those of the second."""
    task, batch = CASES[name].task(), CASES[name].build()[1]
    rows = []
    for c in range(Q):
        for i in range(start, start + count):

            def value(model, example, c=c, i=i):
                output = task.output(model, example)
                return (output * directions(output, i, 1)[:, c]).flatten(1).sum(dim=1)

            rows.append(loop_gradients(task.model, value, task.parameter_names(), one_row(batch, i))[0])
    return torch.stack(rows)


@pytest.mark.parametrize("name", CASES)
def test_operations_are_those_of_the_formed_gradients(name):
    n = length(CASES[name].build()[1])
    for start, block in fans(name, n - 2):
        count = min(n - 2, n - start)
        expected = one_by_one(name, start, count)
        scale = max(1.0, float(expected.abs().max()))
        generator = torch.Generator().manual_seed(1)
        V = torch.randn(expected.shape[1], 3, generator=generator, dtype=torch.float64)
        U = torch.randn(len(expected), 3, generator=generator, dtype=torch.float64)

        def close(values, wanted, scale=scale):
            torch.testing.assert_close(values, wanted, rtol=0, atol=1e-8 * scale * max(1.0, float(wanted.abs().max())))

        assert any(isinstance(part, FanBlock) for part in block.blocks)
        close(block.dense(), expected)
        close(block.matvec(V), expected @ V)
        close(block.rmatvec(U), expected.T @ U)
        added = V.clone()
        block.add_rmatvec(added, U)
        close(added, V + expected.T @ U)
        close(block.gram(block), expected @ expected.T)
        close(block.squared_norms(), expected.square().sum(dim=1))
        close(block.rows(1, len(expected) - 1).dense(), expected[1:-1])


def test_what_went_into_a_layer_is_kept_once():
    [(_, block)] = fans("linear", 8)
    for part in block.blocks:
        assert isinstance(part, FanBlock)
        inputs = {id(piece.terms[0].column) for piece in part.parts}
        assert len(inputs) == 1
        assert part.shared is not None
