"""What taking examples out of a curvature needs of them: their gradients, and their rows F with FᵀF = w Jᵀ(∂²ℓ)J.

Axis letters: r examples, q rows of the GGN an example, d parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.batches import Batches
from refluence.curvature.build import feature_rows
from refluence.curvature.outputs import loss_hessian_roots, root_count
from refluence.errors import PlanError
from refluence.gradients.rows import GradientRows
from refluence.influence import Influence
from refluence.solvers import Identity

LINEARITY = 1e-3


class RemovedRows:
    """The gradients and the rows of the curvature of any train examples, in float64.

    Raises:
        PlanError: a curvature that is no Hessian, or a solver without one.
    """

    def __init__(self, influence: Influence) -> None:
        fit = influence._fitted()
        if influence.curvature not in ("ggn", "hessian"):
            raise PlanError(
                f'the Newton correction takes an example out of the Hessian; the curvature "{influence.curvature}" is '
                'none: fit with curvature "ggn" (or "hessian" for a model that is linear in its parameters)'
            )
        if isinstance(fit.plan.chosen.solver, Identity):
            raise PlanError("the Identity solver has no curvature to take an example out of: use another solver")
        self.influence, self.fit = influence, fit
        self.n, self.device = influence.n_train, fit.rows.device
        self.task, self.weights = influence.task, fit.curvature.weights
        own = dict(fit.capture.parameters)
        self.decay = {
            block: self.task.l2 * torch.cat([own[name].detach().double().flatten() for name in names])
            for block, names in influence.groups.items()
        }
        with fit.capture.ready(), torch.no_grad():
            self.q = root_count(self.task, self.task.output(fit.model, fit.rows.batches.select([0])))

    def of(self, rows: Sequence[int]) -> tuple[dict[str, Float64[Tensor, "r q d"]], dict[str, Float64[Tensor, "r d"]]]:
        """(block → √w f, block → w ∇ℓ) of the examples."""
        distinct = sorted(set(rows))
        place = {row: i for i, row in enumerate(distinct)}
        index = torch.tensor([place[row] for row in rows], device=self.device)
        weights = torch.ones(len(distinct)).double() if self.weights is None else self.weights[distinct].double()
        weights = weights.to(self.device)[:, None]
        train = self.fit.rows.batches
        size = min(train.batch_size, len(distinct))
        batches = Batches(train.select(distinct), size, self.device, self.influence.settings.dtype, "removed examples")
        capture = self.fit.capture
        gradients = GradientRows(capture, batches, capture.loss, 0, progress=False)

        def roots(output: Any, batch: Any, start: int) -> Tensor:
            return loss_hessian_roots(self.task, output, batch, distinct[start])

        features = feature_rows(gradients, roots, self.q, 0)
        # A batch holds the first row of all its examples, then the second.
        wide = {
            block: torch.cat([part.unflatten(0, (self.q, -1)).transpose(0, 1) for part in parts])
            for block, parts in _dense(features).items()
        }
        plain = {block: torch.cat(parts) for block, parts in _dense(gradients).items()}
        return (
            {block: (values * weights[:, :, None].sqrt())[index] for block, values in wide.items()},
            {block: (values * weights)[index] for block, values in plain.items()},
        )

    def check_linear(self, rows: Sequence[int]) -> None:
        """Raise a PlanError unless the Hessian of some examples is FᵀF, as where the outputs are linear in θ."""
        generator = torch.Generator().manual_seed(0)
        sizes = self.fit.curvature.dimensions
        vectors = {b: torch.randn(d, 1, generator=generator).double().to(self.device) for b, d in sizes.items()}
        features, _ = self.of(rows)
        found = self.fit.curvature.sampled(torch.as_tensor(list(rows)), vectors)
        for block, v in vectors.items():
            F = features[block].flatten(0, 1)
            expected = F.T @ (F @ v) / len(rows)
            if float((found[block] - expected).norm()) > LINEARITY * float(found[block].norm() + expected.norm()):
                raise PlanError(
                    f"the Hessian of the removed examples is not that of their losses in the outputs, so "
                    f"{type(self.task.model).__name__} is not linear in the parameters of block {block!r}: fit with "
                    'curvature "ggn"'
                )


def _dense(rows: GradientRows) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {group: [] for group in rows.groups}
    for _, blocks in rows:
        for group, block in blocks.items():
            found[group].append(block.dense().double())
    return found
