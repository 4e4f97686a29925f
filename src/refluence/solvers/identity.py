"""Gradient dot products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from refluence.curvature import EmpiricalFisher
from refluence.errors import PlanError
from refluence.gradients.rows import GradientRows
from refluence.solvers.kernels import cross_grams
from refluence.solvers.primal import GradientFeatures
from refluence.solvers.state import Shifts, State


@dataclass(frozen=True)
class Identity:
    """Gradient dot products: (C + λI)⁻¹ is replaced by I, so a damping has no part in it."""

    def prepare(self, curvature: EmpiricalFisher) -> IdentityState:
        """Measure the gradients' norms."""
        return IdentityState(curvature)


class IdentityState(State):
    """τ(v, g) = vᵀg. The effective dimension is that of the same substitution, tr C."""

    exact = True

    def __init__(self, curvature: EmpiricalFisher) -> None:
        self.rows, self.n, self.dimensions = curvature.rows, curvature.n, curvature.dimensions
        norms = torch.empty(self.n, dtype=torch.float64, device=curvature.rows.device)
        self.traces = dict.fromkeys(self.dimensions, 0.0)
        self.weights = torch.ones_like(norms) if curvature.weights is None else curvature.weights.to(norms)
        norms.zero_()
        for start, blocks in self.rows:
            for group, block in blocks.items():
                part = block.squared_norms()
                norms[start : start + block.n] += part
                self.traces[group] += float((part * self.weights[start : start + block.n]).sum()) / self.n
        self.norms = norms

    def spectra(self) -> dict[str, tuple[NDArray[np.float64], int | None]]:
        """Not known, and not needed: there is no damping to choose."""
        raise PlanError("the Identity solver has no spectrum: it replaces C + λI by I. Give the damping as a number")

    def effective_dimension(self, shifts: Shifts) -> float:
        """tr C, the mean self-influence."""
        return sum(self.traces.values())

    def scores(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[str, Float[Tensor, "k n"]]]:
        """Block → v_iᵀ(w_j g_j)."""
        for block, products in cross_grams(self.rows, tests).items():
            yield block, products.mul_(self.weights[:, None]).T

    def self_influence(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """w_j‖g_j‖²."""
        return self.norms * self.weights

    def inverse_norms(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """‖w_j g_j‖²."""
        return self.norms * self.weights.square()

    def inverse_hvp(self, tests: GradientRows, shifts: Shifts) -> dict[str, Float[Tensor, "k d"]]:
        """The gradients themselves."""
        return {block: rows.double() for block, rows in GradientFeatures(self.rows).tests(tests).items()}
