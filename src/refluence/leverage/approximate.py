"""What the approximate methods share: projected lengths, and the measured error of a few scores."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.leverage.examples import Examples
from refluence.leverage.forms import squared_lengths
from refluence.linalg import Apply, block_conjugate_gradient
from refluence.sketches import Gaussian

PROBES = 16
RTOL, STEPS = 0.02, 40
"""Of the probes' solves: a form's relative error is about the square of the solution's."""
STREAM = 0x6C657665726167


def projected_lengths(
    examples: Examples, W: Float64[Tensor, "k r"], accuracy: float, seed: int
) -> Float64[Tensor, " n"]:
    """‖x_iᵀW‖², or where r is larger than t = 4/ε² of ‖x_iᵀW Πᵀ‖² with Gaussian Π (t×r), of relative variance 2/t."""
    t = int(np.ceil(4 / accuracy**2))
    return squared_lengths(examples, W if W.shape[1] <= t else Gaussian(t, seed).project(W), "leverage")


def measured_error(
    examples: Examples, values: Float64[Tensor, " n"], shift: float, precondition: Apply, seed: int
) -> float:
    """Root mean square of the relative error of the scores of `PROBES` random rows.

    Exact scores x(XᵀX + nλ)⁻¹x by conjugate gradients, a pass over X for each step; the approximation preconditions.
    """
    chosen = np.sort(np.random.default_rng([seed, STREAM]).choice(examples.n, min(PROBES, examples.n), replace=False))
    right = take_rows(examples, torch.from_numpy(chosen)).T
    used = right.square().sum(dim=0) > 0
    if not bool(used.any()):
        return 0.0
    right = right[:, used].contiguous()

    def apply(V: Tensor) -> Tensor:
        wide, total = examples.embed(V), torch.zeros(examples.d, V.shape[1], dtype=V.dtype, device=V.device)
        for _, rows in examples.rows("error of the scores"):
            total.addmm_(rows.T, rows @ wide)
        return examples.restrict(total) + shift * V

    solution = block_conjugate_gradient(apply, right, RTOL, 0.0, STEPS, precondition)
    exact = (right * solution.value).sum(dim=0)
    found = values[torch.from_numpy(chosen).to(values.device)][used]
    return float((found / exact - 1).square().mean().sqrt())


def take_rows(examples: Examples, chosen: Tensor) -> Float64[Tensor, "b k"]:
    """The chosen rows, in ascending order, of the kept columns, by one pass."""
    kept, factors = examples.columns
    found = []
    for start, rows in examples.rows("chosen rows"):
        here = chosen[(chosen >= start) & (chosen < start + rows.shape[0])] - start
        found.append(rows[here.to(rows.device)][:, kept] * factors)
    return torch.cat(found)
