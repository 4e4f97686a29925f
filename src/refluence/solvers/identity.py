"""Gradient dot products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.curvature import Curvature, Vectors
from refluence.errors import PlanError
from refluence.gradients.kernels import cross_grams
from refluence.gradients.rows import GradientRows
from refluence.solvers.cost import Cost, Workload
from refluence.solvers.state import Shifts, Solution, State
from refluence.theory import SpectralMeasure


@dataclass(frozen=True)
class Identity:
    """Gradient dot products: (C + λI)⁻¹ is replaced by I, so neither curvature nor damping has a part in it."""

    def prepare(self, curvature: Curvature) -> IdentityState:
        """Nothing to do."""
        return IdentityState(curvature)

    def restore(self, curvature: Curvature, tensors: dict[str, Tensor]) -> IdentityState:
        """Nothing to do."""
        return IdentityState(curvature)

    def cost(self, w: Workload) -> Cost:
        """One inner product a pair."""
        return Cost(w.score_bytes + w.tests * w.bytes_per_row, 0.0, w.inner_product_work * w.n * w.tests)


class IdentityState(State):
    """τ(v, g) = vᵀg. The effective dimension is that of the same substitution for the Fisher, the mean ‖g‖²."""

    exact = True
    knows_spectrum = True

    @cached_property
    def norms(self) -> Float[Tensor, " n"]:
        """‖g_j‖²."""
        norms = self.curvature.rows.squared_norms()
        return torch.stack([of_block.to(self.curvature.device) for of_block in norms.values()]).sum(dim=0)

    @cached_property
    def _weights(self) -> Float[Tensor, " n"]:
        weights = self.curvature.weights
        return torch.ones_like(self.norms) if weights is None else weights.to(self.norms)

    def spectra(self) -> dict[str, SpectralMeasure]:
        """Not known, and not needed: there is no damping to choose."""
        raise PlanError("the Identity solver has no spectrum: it replaces C + λI by I. Give the damping as a number")

    def effective_dimension(self, shifts: Shifts) -> float:
        """The mean self-influence."""
        return float((self.norms * self._weights).mean())

    def solve(self, vectors: Vectors, shifts: Shifts) -> Solution:
        """The vectors themselves."""
        return Solution(vectors)

    def scores(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[str, Float[Tensor, "k n"]]]:
        """Block → v_iᵀ(w_j g_j)."""
        for block, products in cross_grams(self.curvature.rows, tests).items():
            yield block, products.mul_(self._weights[:, None]).T

    def self_influence(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """w_j‖g_j‖²."""
        return self.norms * self._weights

    def inverse_norms(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """‖w_j g_j‖²."""
        return self.norms * self._weights.square()
