"""States that hold one matrix for each block, of the rows or of their sketches."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from refluence.curvature import Curvature
from refluence.solvers.psd import PositiveMatrix
from refluence.solvers.state import Shifts, State, refuse_singular
from refluence.theory import SpectralMeasure


class MatrixState(State):
    """One symmetric matrix M_b a block, whose non-zero eigenvalues are those of C_b or of its sketch."""

    systems: dict[str, PositiveMatrix]
    knows_spectrum = True

    def __init__(self, curvature: Curvature, matrices: dict[str, Tensor]) -> None:
        super().__init__(curvature)
        self.systems = {block: PositiveMatrix(matrix) for block, matrix in matrices.items()}

    def shift(self, block: str, shift: float) -> float:
        """The μ that is put on the matrix for a wanted one."""
        return shift

    def rank_needed(self, block: str) -> int:
        """The rank at which the curvature is regular."""
        return self.dimensions[block]

    def spectra(self) -> dict[str, SpectralMeasure]:
        """Block → the eigenvalues of M_b."""
        return {block: SpectralMeasure(system.eigenvalues) for block, system in self.systems.items()}

    def systems_at(self, shifts: Shifts) -> Iterator[tuple[str, PositiveMatrix, float]]:
        """(block, M_b, the μ on it)."""
        for block, system in self.systems.items():
            if block not in shifts:
                continue
            shift = self.shift(block, shifts[block])
            if shift == 0:
                refuse_singular(system.rank(), self.rank_needed(block), block)
            yield block, system, shift

    def effective_dimension(self, shifts: Shifts) -> float:
        """Σ_b tr M_b(M_b+μ_bI)⁻¹."""
        return sum(system.effective_dimension(shift) for _, system, shift in self.systems_at(shifts))

    def export(self) -> dict[str, Tensor]:
        """The matrices."""
        return {f"matrix/{block}": system.matrix for block, system in self.systems.items()}


def exported_matrices(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Block → matrix, from what `export` gave."""
    return {name.removeprefix("matrix/"): matrix for name, matrix in tensors.items() if name.startswith("matrix/")}


def sum_over(parts: Iterator[Tensor]) -> Tensor:
    """The sum of tensors, at least one."""
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def scale_rows(matrix: Tensor, scale: Tensor | None) -> Tensor:
    """diag(scale) @ matrix, in place."""
    return matrix if scale is None else matrix.mul_(scale.to(matrix.device)[:, None])


def weighted_gram(gram: Tensor, n: int, roots: Tensor | None) -> Tensor:
    """√W FFᵀ √W / n, in place."""
    gram /= n
    if roots is not None:
        scale_rows(gram, roots)
        gram *= roots.to(gram.device)
    return gram


def root_weights(weights: Tensor | None) -> Tensor | None:
    """√w in float64, None for equal weights."""
    return None if weights is None else weights.double().sqrt()
