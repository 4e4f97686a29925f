"""A small problem for the solvers: curvature, train and test gradients of a network, and all of them dense."""

from __future__ import annotations

import torch
from torch import nn

import refluence as rf
from refluence.batches import Batches
from refluence.curvature.build import make_curvature
from refluence.gradients.capture import Capture
from refluence.gradients.groups import parameter_groups
from refluence.gradients.rows import GradientRows

N, K = 19, 6
CLASSES = 3
OUTPUTS = {"fisher": 1, "mc_fisher": 2, "ggn": CLASSES, "true_fisher": CLASSES, "hessian": None}


class Solving:
    """d = 35 parameters, N train and K test examples.

    Args:
        name: of the curvature.
        blocks: "full", "module" or "parameter".
        weighted: unequal weights, some of them 0.
        batch_size: N for one batch.
        q: rows an example, None for products only; by default what the curvature has.
        tests: which test rows; all by default.
    """

    def __init__(self, name="fisher", blocks="full", weighted=False, batch_size=7, q="own", dtype=torch.float64, n=N):
        generator = torch.Generator().manual_seed(11)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES)).to(dtype)
        for parameter in self.model.parameters():
            parameter.data = normal(*parameter.shape)
        self.task = rf.Task(self.model)
        self.blocks, self.batch_size = blocks, batch_size
        train = normal(n, 4), torch.randint(CLASSES, (n,), generator=generator)
        self.test = normal(K, 4), torch.randint(CLASSES, (K,), generator=generator)
        weights = torch.rand(n, generator=generator, dtype=torch.float64) * 2
        weights[::5] = 0
        self.weights = weights if weighted else None
        names = [name for name, _ in self.model.named_parameters()]
        self.groups = parameter_groups(self.model, names, blocks)
        batches = Batches(train, batch_size, dtype=dtype)
        self.capture = Capture(self.task, self.model, self.groups, batches)
        rows = GradientRows(self.capture, batches, self.capture.loss, 1 << 30, progress=False)
        count = OUTPUTS[name] if q == "own" else q
        self.curvature = make_curvature(name, rows, self.weights, count, 1 << 30, seed=3)
        self.tests = self.test_rows(0, K, 4)
        self.G, self.V = dense(rows), dense(self.tests)
        self.C = self.curvature.dense()
        self.w = torch.ones(n).double() if self.weights is None else self.weights

    def test_rows(self, start, stop, batch_size):
        """Gradients of some of the tests."""
        batches = Batches(tuple(x[start:stop] for x in self.test), batch_size, dtype=self.test[0].dtype)
        return GradientRows(self.capture, batches, self.capture.measurement, 1 << 30, progress=False)

    def shifts(self, damping):
        """Another damping for each block."""
        return {block: damping * (1 + i) for i, block in enumerate(self.groups)}

    def expected(self, inverses):
        """(block → scores, self-influence, inverse norms) for the inverse of each block, dense."""
        scores = {b: (self.V[b] @ H @ self.G[b].T) * self.w for b, H in inverses.items()}
        own = sum((self.G[b] @ H * self.G[b]).sum(dim=1) for b, H in inverses.items()) * self.w
        norms = sum((self.G[b] @ H).square().sum(dim=1) for b, H in inverses.items()) * self.w.square()
        return scores, own, norms

    def check(self, state, inverses, shifts, rtol=1e-8):
        """Every form in which the state applies its inverse has these values."""
        scores, own, norms = self.expected(inverses)
        found = dict(state.scores(self.tests, shifts))
        assert set(found) == set(scores)
        for block, expected in scores.items():
            assert_equal(found[block], expected, rtol)
        assert_equal(state.self_influence(shifts), own, rtol)
        assert_equal(state.inverse_norms(shifts), norms, rtol)
        for block, rows in state.inverse_hvp(self.tests, shifts).items():
            assert_equal(rows, self.V[block] @ inverses[block].T, rtol)
        some = {b: self.V[b].T for b in self.groups}
        for vectors in (some, {b: v.contiguous() for b, v in some.items()}):
            for block, values in state.solve(vectors, shifts).values.items():
                assert_equal(values, inverses[block] @ vectors[block], rtol)


def dense(rows):
    """Block → all gradients, in float64."""
    return {g: torch.cat([blocks[g].dense() for _, blocks in rows]).double() for g in rows.groups}


def assert_equal(found, expected, rtol=1e-8):
    """All entries; small ones relative to the largest."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=rtol * 1e-1 * scale)
