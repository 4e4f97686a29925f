"""Models in low precision give gradients near the float64 ones; a float64 copy gives the float64 ones."""

import pytest
import torch

from refluence.batches import Batches
from refluence.gradients.capture import Capture
from support.models import CASES
from support.reference import loop_gradients

NAMES = [
    "linear",
    "linear on sequences",
    "conv2d padding",
    "layer norm on sequences",
    "tied head with bias",
    "small ResNet",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_gradients_are_near_the_float64_ones(name, dtype, rtol):
    model, batch = CASES[name].build()
    task = CASES[name].task()
    names = task.parameter_names()
    expected = loop_gradients(model, lambda m, b: task.losses(task.output(m, b), b), names, batch)
    task.model.to(dtype)
    batches = Batches(batch, 3, dtype=dtype)
    capture = Capture(task, task.model, {"full": names}, batches)
    found = [blocks["full"] for _, blocks in capture.gradients(batches, capture.loss)]
    assert {block.dtype for block in found} == {dtype}
    rows = torch.cat([block.dense() for block in found]).double()
    assert (rows - expected).norm() <= rtol * expected.norm()
    # products are summed in float64 whatever the gradients' dtype
    gram = found[0].gram(found[1])
    assert gram.dtype == torch.float64
    own, theirs = (block.dense().double() for block in found[:2])
    torch.testing.assert_close(gram, own @ theirs.T, rtol=rtol, atol=rtol * float(own.norm() * theirs.norm()))
