"""A symmetric positive semi-definite matrix M with a shift: everything that solvers ask of (M + μI)⁻¹.

One Cholesky factor serves one μ. The eigendecomposition, which serves every μ, costs some twenty times as much, so it
is made when it is asked for, or once that many factors have been made.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from refluence.errors import PlanError
from refluence.theory import numerical_rank

SMALL = 1024
PANEL = 512
ROUNDING = 1e3
"""Relative error allowed is some ROUNDING⁻¹: below ROUNDING·ε·‖M‖ a damping is refused."""
FACTORS_WORTH_AN_EIGENDECOMPOSITION = 20


class PositiveMatrix:
    """M ⪰ 0 in float64, N×N, with solves and traces of M + μI."""

    def __init__(self, matrix: Float[Tensor, "N N"]) -> None:
        self.matrix = matrix
        self.size = matrix.shape[0]
        self._eigenvalues: NDArray[np.float64] | None = None
        self._eigenvectors: Tensor | None = None
        self._factor: tuple[float, Tensor] | None = None
        self._inverse_diagonal: tuple[float, Tensor] | None = None
        self._factors_made = 0

    @property
    def eigenvalues(self) -> NDArray[np.float64]:
        """Ascending, rounding noise below 0 set to 0."""
        if self._eigenvalues is None:
            values = torch.linalg.eigvalsh(self.matrix)
            self._eigenvalues = np.maximum(values.cpu().numpy(), 0.0)
        return self._eigenvalues

    def eigendecomposition(self) -> tuple[Float[Tensor, " N"], Float[Tensor, "N N"]]:
        """(eigenvalues, eigenvectors as columns), made once."""
        if self._eigenvectors is None:
            values, self._eigenvectors = torch.linalg.eigh(self.matrix)
            self._eigenvalues = np.maximum(values.cpu().numpy(), 0.0)
        values = torch.as_tensor(self.eigenvalues, device=self.matrix.device)
        return values, self._eigenvectors

    def effective_dimension(self, shift: float) -> float:
        """tr M(M+μI)⁻¹."""
        if shift == 0:
            return float(self.rank())
        if self._eigenvalues is None and self.size >= SMALL:
            dimension = float(self.size - shift * self.inverse_diagonal(shift).sum())
            # The difference has lost its digits where the dimension is tiny beside the size.
            return dimension if dimension > 1e-6 * self.size else float(self.leverages(shift).sum())
        return float((self.eigenvalues / (self.eigenvalues + shift)).sum())

    def solve(self, right: Float[Tensor, "N k"], shift: float) -> Float[Tensor, "N k"]:
        """(M+μI)⁻¹ B, to a relative error of about ε·σ_max/μ; at μ = 0 the least-norm solution M⁺B."""
        self._refuse_rounding(shift)
        if self._use_eigenvectors(shift):
            values, vectors = self.eigendecomposition()
            return vectors @ (_inverse(values, shift)[:, None] * (vectors.T @ right))
        return torch.cholesky_solve(right, self._cholesky(shift))

    def inverse_root(self, shift: float) -> Float[Tensor, "N N"]:
        """W, upper triangular, with W Wᵀ = (M+μI)⁻¹, for μ > 0."""
        unit = torch.eye(self.size, dtype=self.matrix.dtype, device=self.matrix.device)
        return torch.linalg.solve_triangular(self._cholesky(shift), unit, upper=False).T

    def inverse_diagonal(self, shift: float) -> Float[Tensor, " N"]:
        """Diagonal of (M+μI)⁻¹."""
        if self._inverse_diagonal is None or self._inverse_diagonal[0] != shift:
            self._inverse_diagonal = (shift, _inverse_diagonal_of(self._cholesky(shift)))
        return self._inverse_diagonal[1]

    def inverse_trace(self, shift: float) -> float:
        """tr (M+μI)⁻¹."""
        if self._eigenvalues is None and self.size >= SMALL and shift > 0:
            return float(self.inverse_diagonal(shift).sum())
        return float((1.0 / (self.eigenvalues + shift)).sum())

    def leverages(self, shift: float) -> Float[Tensor, " N"]:
        """Diagonal of M(M+μI)⁻¹, each to full relative accuracy: no 1 − μ(M+μI)⁻¹ that cancels for small rows."""
        return (self.matrix * self._inverse_matrix(shift)).sum(dim=1).clamp_(min=0.0)

    def squared_leverages(self, shift: float) -> Float[Tensor, " N"]:
        """Diagonal of M(M+μI)⁻²."""
        inverse = self._inverse_matrix(shift)
        return (inverse * (self.matrix @ inverse)).sum(dim=1).clamp_(min=0.0)

    def _inverse_matrix(self, shift: float) -> Float[Tensor, "N N"]:
        if shift == 0:
            values, vectors = self.eigendecomposition()
            return (vectors * _inverse(values, shift)) @ vectors.T
        return torch.cholesky_inverse(self._cholesky(shift))

    def _refuse_rounding(self, shift: float) -> None:
        """An error where M + μI is singular to rounding, whichever factorisation is at hand."""
        floor = ROUNDING * torch.finfo(torch.float64).eps * float(self.matrix.norm())
        if 0 < shift < floor and float(self.eigenvalues[0]) + shift < floor:
            raise PlanError(
                f"the damping {shift:.3g} is below the rounding of the curvature, {floor:.3g}: use a larger damping"
            )

    def rank(self) -> int:
        """The numerical rank."""
        return numerical_rank(self.eigenvalues)

    def _use_eigenvectors(self, shift: float) -> bool:
        if self._eigenvectors is not None or shift <= 0:
            return True
        if self._factor is not None and self._factor[0] == shift:
            return False
        return self._factors_made >= (2 if self.size <= SMALL else FACTORS_WORTH_AN_EIGENDECOMPOSITION)

    def _cholesky(self, shift: float) -> Float[Tensor, "N N"]:
        self._refuse_rounding(shift)
        if self._factor is None or self._factor[0] != shift:
            self._factor = None
            diagonal = self.matrix.diagonal()
            saved = diagonal.clone()
            try:
                diagonal += shift
                factor, info = torch.linalg.cholesky_ex(self.matrix)
            finally:
                diagonal.copy_(saved)
            if int(info) != 0:
                raise PlanError(f"the curvature is not positive at damping {shift:.3g}: use a larger damping")
            self._factor = (shift, factor)
            self._factors_made += 1
        return self._factor[1]


def _inverse(values: Float[Tensor, " N"], shift: float) -> Float[Tensor, " N"]:
    if shift > 0:
        return 1.0 / (values + shift)
    floor = values.numel() * torch.finfo(values.dtype).eps * values.max()
    return torch.where(values > floor, 1.0 / values, 0.0)


def _inverse_diagonal_of(factor: Float[Tensor, "N N"]) -> Float[Tensor, " N"]:
    """Diagonal of (LLᵀ)⁻¹: squared column norms of L⁻¹, some columns at a time and without their zeros."""
    size = factor.shape[0]
    diagonal = factor.new_empty(size)
    for first in range(0, size, PANEL):
        last = min(first + PANEL, size)
        unit = torch.eye(size - first, last - first, dtype=factor.dtype, device=factor.device)
        columns = torch.linalg.solve_triangular(factor[first:, first:], unit, upper=False)
        diagonal[first:last] = columns.square_().sum(dim=0)
    return diagonal
