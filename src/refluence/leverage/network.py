"""Leverage of the examples of a network: how much of the generalised Gauss-Newton matrix each carries. Needs no labels.

Axis letters: n examples, q rows of the GGN an example (its outputs), d parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.curvature.build import feature_rows
from refluence.curvature.outputs import loss_hessian_roots, root_count
from refluence.errors import PlanError
from refluence.gradients.selection import select_rows
from refluence.influence import Influence
from refluence.progress import track
from refluence.solvers import Identity

BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class BlockLeverage:
    """L_i of every training example.

    Attributes:
        matrices: (n, q, q), symmetric, with eigenvalues in [0, 1); over several blocks of parameters their sum.
        values: (n,), tr L_i. Σ_i tr L_i = d_λ.
    """

    matrices: Float64[Tensor, "n q q"]

    @property
    def values(self) -> Float64[Tensor, " n"]:
        """tr L_i."""
        return self.matrices.diagonal(dim1=1, dim2=2).sum(dim=1)


def block_leverage(influence: Influence, *, progress: bool = True) -> BlockLeverage:
    """L_i = Λ_i^½ J_i (nH)⁻¹ J_iᵀ Λ_i^½, H = C + (l2+λ)I: the leverage of an example's outputs in a network.

    J_i is the Jacobian of the example's outputs, Λ_i = w_i ∇²ℓ_i the loss's Hessian in them, C = (1/n) Σ J_iᵀΛ_iJ_i the
    GGN; Λ_i^½ is a root S_i with S_i S_iᵀ = Λ_i, so the matrix is one up to a rotation of the outputs, and its trace
    and eigenvalues are not touched by it. For cross entropy and squared loss no label is in it. (I − L_i)⁻¹ is the
    factor by which removing the example moves its own outputs more than influence says. For squared loss ½r² of a
    linear model it is the ridge leverage of the inputs.

    Args:
        influence: fitted with curvature "ggn"; any solver but Identity.
        progress: whether a long pass shows a bar.

    Raises:
        PlanError: another curvature, or the Identity solver.
        TaskError: a loss whose Hessian in the outputs is not positive.
    """
    fit = influence._fitted()
    if influence.curvature != "ggn":
        raise PlanError(f'block leverage is of the GGN, and the curvature is "{influence.curvature}": fit with "ggn"')
    if isinstance(fit.plan.chosen.solver, Identity):
        raise PlanError("the Identity solver has no curvature: use another solver")
    task, n, weights = influence.task, influence.n_train, fit.curvature.weights

    def roots(output: Any, batch: Any, start: int) -> Tensor:
        return loss_hessian_roots(task, output, batch, start)

    with fit.capture.ready(), torch.no_grad():
        q = root_count(task, task.output(fit.model, fit.rows.batches.select([0])))
    features = feature_rows(fit.rows, roots, q, 0)
    features.progress = False
    found = torch.zeros(n, q, q, dtype=torch.float64, device=fit.rows.device)
    for start, blocks in track(features, "block leverage", len(fit.rows.batches), progress):
        for block, rows in blocks.items():
            count = rows.n // q
            step = max(1, BYTES // (16 * q * fit.curvature.dimensions[block]))
            for first in range(0, count, step):
                last = min(first + step, count)
                # a batch holds the first row of all its examples, then the second
                among = (torch.arange(q)[:, None] * count + torch.arange(first, last)).flatten().to(found.device)
                F = select_rows(rows, among).dense().double()
                solved = fit.state.solve({block: F.T}, {block: influence.shifts[block]}).values[block].T.double()
                wide = (q, last - first, F.shape[1])
                here = slice(start + first, start + last)
                found[here] += torch.einsum("qid,pid->iqp", F.reshape(wide), solved.reshape(wide)) / n
    if weights is not None:
        found *= weights.to(found)[:, None, None]
    return BlockLeverage((found + found.mT) / 2)
