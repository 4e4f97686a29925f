"""A symmetric matrix that may be indefinite, with solves of M + μI."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from refluence.errors import PlanError
from refluence.solvers.psd import ROUNDING, PositiveMatrix
from refluence.theory import effective_dimension


class SymmetricMatrix(PositiveMatrix):
    """M = Mᵀ in float64, N×N; by its eigenvectors, which an indefinite matrix needs for every shift."""

    @property
    def eigenvalues(self) -> NDArray[np.float64]:
        """Ascending, negative ones as they are."""
        return self.eigendecomposition()[0].cpu().numpy()

    def eigendecomposition(self) -> tuple[Float[Tensor, " N"], Float[Tensor, "N N"]]:
        """(eigenvalues, eigenvectors as columns), made once."""
        if self._eigenvectors is None:
            self._values, self._eigenvectors = torch.linalg.eigh(self.matrix)
        return self._values, self._eigenvectors

    def effective_dimension(self, shift: float) -> float:
        """tr M(M+μI)⁻¹ of the positive part."""
        return effective_dimension(np.maximum(self.eigenvalues, 0.0), shift)

    def rank(self) -> int:
        """The numerical rank."""
        sizes = np.abs(self.eigenvalues)
        return int((sizes > self.size * np.finfo(np.float64).eps * sizes.max()).sum())

    def solve(self, right: Float[Tensor, "N k"], shift: float) -> Float[Tensor, "N k"]:
        """(M+μI)⁻¹ B, to a relative error of about ε·‖M‖/min|σ+μ|."""
        values, vectors = self.eigendecomposition()
        shifted = values + shift
        nearest = int(shifted.abs().argmin())
        if float(shifted[nearest].abs()) < ROUNDING * torch.finfo(torch.float64).eps * float(values.abs().max()):
            raise PlanError(
                f"the curvature has the eigenvalue {float(values[nearest]):.6g}, so at a damping of {shift:.6g} it has "
                "no inverse: use another damping"
            )
        return vectors @ ((vectors.T @ right) / shifted[:, None])
