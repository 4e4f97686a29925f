"""Every solver, small least-squares problems, and the scores of the dense inverse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import refluence as rf
from refluence.solvers import (
    Arnoldi,
    ConjugateGradient,
    Dense,
    Ekfac,
    Gram,
    HarmonicMean,
    Identity,
    Kfac,
    Lissa,
    Nystroem,
    Sketched,
)
from support.curvatures import DenseReference
from support.problems import SEED, damped

EXACT = {
    "Gram": Gram(),
    "Dense": Dense(),
    "CG": ConjugateGradient(rtol=1e-12),
    "CG by columns": ConjugateGradient(rtol=1e-12, block=False),
    "Lissa": Lissa(tolerance=1e-9),
    "Arnoldi": Arnoldi(1000, tolerance=1e-12),
    "Nystroem": Nystroem(1000),
}
ALL = EXACT | {
    "HarmonicMean": HarmonicMean(),
    "Kfac": Kfac(),
    "Ekfac": Ekfac(),
    "Sketched": Sketched(rf.sketches.SJLT(16), corrected=False),
    "Identity": Identity(),
}
CURVATURES = ("fisher", "ggn", "hessian", "true_fisher", "mc_fisher")
exact_solvers = pytest.mark.parametrize("solver", EXACT.values(), ids=EXACT)
all_solvers = pytest.mark.parametrize("solver", ALL.values(), ids=ALL)


def linear(n=24, inputs=3, outputs=2, seed=0, dtype=torch.float64):
    """Least squares of full rank: a model with its data."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inputs, outputs).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x, y = (torch.randn(n, size, generator=generator, dtype=torch.float64) for size in (inputs, outputs))
    return layer.to(dtype), (x.to(dtype), y.to(dtype))


def fitted(model, train, solver, curvature="ggn", damping=0.1, loss="mse", **options):
    options = {"batch_size": 16, "progress": False, "seed": SEED, **options}
    return rf.Influence(rf.Task(model, loss=loss), curvature, solver, damping, **options).fit(train)


def expected_scores(model, train, test, curvature, shift, loss="mse"):
    """(scores, self-influence) of the dense inverse."""
    names = [name for name, _ in model.named_parameters()]
    reference = DenseReference(model, names, loss, train)
    V = DenseReference(model, names, loss, test).gradients
    H, G = torch.linalg.inv(damped(reference.curvature(curvature), shift)), reference.gradients
    return V @ H @ G.T, ((G @ H) * G).sum(dim=1)
