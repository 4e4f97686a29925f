"""The empirical Fisher as an operator: products and traces, block by block, equal those of dense rows."""

import pytest
import torch

from refluence.batches import Batches
from refluence.curvature import OuterCurvature
from refluence.gradients.capture import Capture
from refluence.gradients.groups import parameter_groups
from refluence.gradients.rows import GradientRows
from support.models import CASES
from support.reference import columns_of, curvature, loop_gradients


@pytest.mark.parametrize("name", ["linear", "linear on sequences", "conv2d padding", "tied head with bias"])
@pytest.mark.parametrize("blocks", ["full", "parameter"])
@pytest.mark.parametrize("weighted", [False, True])
def test_products_and_traces_equal_those_of_the_dense_curvature(name, blocks, weighted):
    model, batch = CASES[name].build()
    task = CASES[name].task()
    names = task.parameter_names()
    groups = parameter_groups(task.model, names, blocks)
    capture = Capture(task, task.model, groups, Batches(batch))
    rows = GradientRows(capture, Batches(batch, 2), capture.loss, 10**9, progress=False)
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.25], dtype=torch.float64) if weighted else None
    fisher = OuterCurvature("fisher", rows, rows, weights)
    G = loop_gradients(model, lambda m, b: task.losses(task.output(m, b), b), names, batch)
    generator = torch.Generator().manual_seed(0)
    V = {g: torch.randn(d, 2, generator=generator, dtype=torch.float64) for g, d in fisher.dimensions.items()}
    found, traces = fisher.matvec(V), fisher.traces()
    for group, columns in zip(groups, columns_of(model, names, groups.values()), strict=True):
        C = curvature(G[:, columns], weights)
        torch.testing.assert_close(found[group], C @ V[group], rtol=1e-9, atol=1e-12)
        assert traces[group] == pytest.approx(float(C.trace()), rel=1e-10)
