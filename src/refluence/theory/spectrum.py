"""Effective dimension of a spectrum, and the damping that gives a wanted one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from refluence.errors import RefluenceError

Spectrum = Tensor | NDArray | Sequence[float]

EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class SpectralMeasure:
    """What is known of the eigenvalues of a matrix: tr f(C) = Σ_j multiplicity_j f(value_j).

    Args:
        values: eigenvalues, or the nodes of a quadrature; zeros may be left out.
        multiplicities: how often each counts; None: once.
        sketch_size: m where the values are those of PCPᵀ and are to be corrected for the sketch's own damping.
    """

    values: NDArray[np.float64]
    multiplicities: NDArray[np.float64] | None = None
    sketch_size: int | None = None

    @property
    def counts(self) -> NDArray[np.float64]:
        """The multiplicities as numbers."""
        return np.ones_like(self.values) if self.multiplicities is None else self.multiplicities

    @property
    def trace(self) -> float:
        """tr C."""
        return float((self.counts * self.values).sum())

    def positive_part(self) -> SpectralMeasure:
        """Negative eigenvalues, as an indefinite Hessian has, set to 0."""
        return replace(self, values=np.maximum(self.values, 0.0))


def as_numbers(eigenvalues: Spectrum) -> NDArray[np.float64]:
    """Eigenvalues, of whatever sign, as a float64 array.

    Raises:
        RefluenceError: not a vector, empty, or not finite.
    """
    if isinstance(eigenvalues, Tensor):
        eigenvalues = eigenvalues.detach().cpu().numpy()
    values = np.asarray(eigenvalues, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise RefluenceError(f"eigenvalues must be a vector of finite numbers, not shape {values.shape}")
    return values


def as_spectrum(eigenvalues: Spectrum) -> NDArray[np.float64]:
    """Eigenvalues as a float64 array, negative rounding noise set to 0.

    Raises:
        RefluenceError: not a vector, empty, not finite, or negative beyond rounding.
    """
    values = as_numbers(eigenvalues)
    if values.min() < -1e-6 * max(values.max(), 0.0) - np.finfo(np.float64).tiny:
        raise RefluenceError(
            f"the smallest eigenvalue is {values.min():.3g}: the effective dimension is defined for C ⪰ 0 only"
        )
    return np.maximum(values, 0.0)


def effective_dimension(
    eigenvalues: Spectrum | Float[Tensor, " r"], damping: float, multiplicities: Spectrum | None = None
) -> float:
    """d_λ = tr C(C+λI)⁻¹ = Σ_j σ_j/(σ_j+λ) of C's eigenvalues σ; at λ = 0 the number of positive ones.

    Args:
        eigenvalues: of C; zeros may be left out.
        damping: λ ≥ 0, in the units of the eigenvalues.
        multiplicities: how often each eigenvalue counts, where they are nodes of a quadrature; None: once.

    Raises:
        RefluenceError: a negative damping or eigenvalue.
    """
    if not damping >= 0:
        raise RefluenceError(f"damping must be ≥ 0, not {damping!r}")
    values = as_spectrum(eigenvalues)
    counts = np.ones_like(values) if multiplicities is None else as_spectrum(multiplicities)
    positive = values > 0
    return float((counts[positive] * values[positive] / (values[positive] + damping)).sum())


def stable_rank(eigenvalues: Spectrum) -> float:
    """tr C/‖C‖ = Σ_j σ_j/σ_max, between 1 and the rank; 0 for C = 0. It is λ·d_λ/‖C‖ for λ → ∞, and d_λ ≤ (‖C‖/λ)·it.

    Args:
        eigenvalues: of C ⪰ 0; zeros may be left out.
    """
    values = as_spectrum(eigenvalues)
    return float(values.sum() / values.max()) if values.max() > 0 else 0.0


def numerical_rank(eigenvalues: Spectrum, size: int | None = None) -> int:
    """How many eigenvalues exceed size · ε · σ_max, the rounding of a float64 eigensolver."""
    values = as_spectrum(eigenvalues)
    return int((values > (size or values.size) * EPSILON * values.max()).sum())


def damping_for(
    eigenvalues: Spectrum | Float[Tensor, " r"], dimension: float, multiplicities: Spectrum | None = None
) -> float:
    """The λ with effective dimension d_λ = `dimension`.

    Args:
        eigenvalues: of C; zeros may be left out.
        dimension: the wanted d_λ, 0 < d_λ < rank.
        multiplicities: how often each eigenvalue counts, where they are nodes of a quadrature; None: once.

    Raises:
        RefluenceError: a dimension that no λ > 0 gives.
    """
    values = as_spectrum(eigenvalues)
    above_rounding = np.where(values > values.size * EPSILON * values.max(), values, 0.0)
    rank = effective_dimension(above_rounding, 0.0, multiplicities)
    if not 0 < dimension < rank:
        raise RefluenceError(
            f"no damping gives an effective dimension of {dimension:g}: it must lie between 0 and the rank, {rank:g}"
        )
    top = float(values.max())

    def excess(log_damping: float) -> float:
        return effective_dimension(values, top * float(np.exp(log_damping)), multiplicities) - dimension

    # d_λ ≤ rank·σ_max/λ bounds the root from above; the rounding floor bounds it from below.
    high = np.log(max(rank, values.size) / dimension) + 1.0
    low = -60.0
    return top * float(np.exp(brentq(excess, low, high, xtol=1e-13, rtol=1e-13)))
