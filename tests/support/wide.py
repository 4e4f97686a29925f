"""Networks with more parameters than train examples, so that test gradients leave the span of the train ones."""

from __future__ import annotations

import torch
from torch import nn

import refluence as rf


class Wide:
    """A network inputs-hidden-3 of random weights, with n train and k test examples, in float64.

    Args:
        damping: of `exact` and, unless told otherwise, of `influence`.
    """

    def __init__(self, n, k, inputs, hidden, seed, damping):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.model = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()
        for parameter in self.model.parameters():
            parameter.data = normal(*parameter.shape)
        self.train = normal(n, inputs), torch.randint(3, (n,), generator=generator)
        self.test = normal(k, inputs), torch.randint(3, (k,), generator=generator)
        self.weights = torch.rand(n, generator=generator, dtype=torch.float64) * 2
        self.weights[::6] = 0
        self.damping = damping
        self.exact = self.influence(rf.solvers.Gram())

    def influence(self, solver, weights=None, l2=0.0, **options):
        options = {"damping": self.damping, "progress": False, **options}
        return rf.Influence(rf.Task(self.model, l2=l2), solver=solver, **options).fit(self.train, weights=weights)
