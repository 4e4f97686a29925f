"""The exact primal solver."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from refluence.curvature import Curvature, Vectors
from refluence.solvers.cost import Cost, Workload
from refluence.solvers.psd import PositiveMatrix
from refluence.solvers.state import OperatorState, Shifts, Solution, refuse_singular
from refluence.solvers.symmetric import SymmetricMatrix
from refluence.solvers.systems import exported_matrices
from refluence.theory import SpectralMeasure


@dataclass(frozen=True)
class Dense:
    """Exact, through the d×d curvature in float64, for models of a few thousand parameters; any curvature.

    An indefinite Hessian is inverted as it is, (H+μI)⁻¹ with its negative eigenvalues, which are counted in the
    diagnostics and warned about where −μ lies above one of them: such a point is no minimum of the damped objective,
    and a score is then not the effect of a removal. Where μ is an eigenvalue's negative to rounding it is an error.

    Costs at most n·q·d² + d³/3 multiply-adds and 16 d² bytes, of each block. Rows of the curvature that share what
    their layers were fed, as those of the GGN of a fully connected model, cost about n·d²/4, whatever q is.
    """

    def prepare(self, curvature: Curvature) -> DenseState:
        """Form the curvature."""
        return DenseState(curvature, curvature.dense())

    def restore(self, curvature: Curvature, tensors: dict[str, Tensor]) -> DenseState:
        """The state from what it exported."""
        return DenseState(curvature, exported_matrices(tensors))

    def cost(self, w: Workload) -> Cost:
        """16 d² bytes and d³/3 multiply-adds a block, and the products that form it."""
        sizes = w.dimensions.values()
        fixed = sum(16.0 * d**2 for d in sizes) + 8.0 * max(sizes) ** 2 + w.score_bytes + w.test_bytes
        forming = w.n * w.q * sum(d**2 for d in sizes) if w.q is not None else w.product_work * w.d
        work = forming + sum(w.spectral * d**3 / 3 + d**2 * w.tests for d in sizes) + w.dot_work
        return Cost(fixed, w.n * (w.bytes_per_row + w.feature_bytes_per_row), work, passes=2.0)


class DenseState(OperatorState):
    """One d×d matrix a block."""

    exact = True
    knows_spectrum = True

    def __init__(self, curvature: Curvature, matrices: dict[str, Tensor]) -> None:
        super().__init__(curvature)
        kind = PositiveMatrix if curvature.positive else SymmetricMatrix
        self.systems = {block: kind(matrix) for block, matrix in matrices.items()}
        self._warned: set[tuple[str, float]] = set()

    def export(self) -> dict[str, Tensor]:
        """The matrices."""
        return {f"matrix/{block}": system.matrix for block, system in self.systems.items()}

    @property
    def traces(self) -> dict[str, float]:  # type: ignore[override]
        """Block → tr C_b."""
        return {block: float(system.matrix.trace()) for block, system in self.systems.items()}

    def spectra(self) -> dict[str, SpectralMeasure]:
        """Block → the eigenvalues."""
        return {block: SpectralMeasure(system.eigenvalues) for block, system in self.systems.items()}

    def effective_dimension(self, shifts: Shifts) -> float:
        """Σ_b tr C_b(C_b+μ_bI)⁻¹; negative eigenvalues count as 0."""
        return sum(self._at(block, shift).effective_dimension(shift) for block, shift in shifts.items())

    def solve(self, vectors: Vectors, shifts: Shifts) -> Solution:
        """(C_b+μ_b)⁻¹V_b by a factorisation of each block."""
        return Solution({b: self._at(b, shifts[b]).solve(v.double(), shifts[b]) for b, v in vectors.items()})

    def _at(self, block: str, shift: float) -> PositiveMatrix:
        system = self.systems[block]
        if shift == 0:
            refuse_singular(system.rank(), system.size, block)
        if isinstance(system, SymmetricMatrix) and (block, shift) not in self._warned:
            self._warned.add((block, shift))
            below = int((system.eigenvalues < -shift).sum())
            rounding = system.size * np.finfo(np.float64).eps * abs(system.eigenvalues).max()
            negative = int((system.eigenvalues < -rounding).sum())
            self.diagnostics.setdefault("negative_eigenvalues", {})[block] = negative
            self.diagnostics.setdefault("negative_shifted", {})[block] = below
            if below:
                other = '"fisher"' if self.curvature.name == "ggn" else '"ggn"'
                warnings.warn(
                    f"the damped {self.curvature.name} of block {block!r} has {below} of {system.size} negative "
                    f"eigenvalues, the smallest {system.eigenvalues[0] + shift:.3g}: the model is at no minimum, and "
                    f"scores need not be effects of removal. Use a damping above {-system.eigenvalues[0]:.3g}, or "
                    f"the curvature {other}",
                    stacklevel=2,
                )
        return system
