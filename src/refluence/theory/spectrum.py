"""Effective dimension of a spectrum, and the damping that gives a wanted one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from refluence.errors import RefluenceError

Spectrum = Tensor | NDArray | Sequence[float]


def as_spectrum(eigenvalues: Spectrum) -> NDArray[np.float64]:
    """Eigenvalues as a float64 array, negative rounding noise set to 0.

    Raises:
        RefluenceError: not a vector, empty, not finite, or negative beyond rounding.
    """
    if isinstance(eigenvalues, Tensor):
        eigenvalues = eigenvalues.detach().cpu().numpy()
    values = np.asarray(eigenvalues, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise RefluenceError(f"eigenvalues must be a vector of finite numbers, not shape {values.shape}")
    if values.min() < -1e-6 * max(values.max(), 0.0) - np.finfo(np.float64).tiny:
        raise RefluenceError(
            f"the smallest eigenvalue is {values.min():.3g}: the effective dimension is defined for C ⪰ 0 only"
        )
    return np.maximum(values, 0.0)


def effective_dimension(eigenvalues: Spectrum | Float[Tensor, " r"], damping: float) -> float:
    """d_λ = tr C(C+λI)⁻¹ = Σ_j σ_j/(σ_j+λ) of C's eigenvalues σ; at λ = 0 the number of positive ones.

    Args:
        eigenvalues: of C; zeros may be left out.
        damping: λ ≥ 0, in the units of the eigenvalues.

    Raises:
        RefluenceError: a negative damping or eigenvalue.
    """
    if not damping >= 0:
        raise RefluenceError(f"damping must be ≥ 0, not {damping!r}")
    values = as_spectrum(eigenvalues)
    positive = values[values > 0]
    return float((positive / (positive + damping)).sum())


def numerical_rank(eigenvalues: Spectrum, size: int | None = None) -> int:
    """How many eigenvalues exceed size · ε · σ_max, the rounding of a float64 eigensolver."""
    values = as_spectrum(eigenvalues)
    return int((values > (size or values.size) * np.finfo(np.float64).eps * values.max()).sum())


def damping_for(eigenvalues: Spectrum | Float[Tensor, " r"], dimension: float) -> float:
    """The λ with effective dimension d_λ = `dimension`.

    Args:
        eigenvalues: of C; zeros may be left out.
        dimension: the wanted d_λ, 0 < d_λ < rank.

    Raises:
        RefluenceError: a dimension that no λ > 0 gives.
    """
    values = as_spectrum(eigenvalues)
    rank = numerical_rank(values)
    if not 0 < dimension < rank:
        raise RefluenceError(
            f"no damping gives an effective dimension of {dimension:g}: it must lie between 0 and the rank, {rank}"
        )
    top = float(values.max())

    def excess(log_damping: float) -> float:
        return effective_dimension(values, top * float(np.exp(log_damping))) - dimension

    # d_λ ≤ rank·σ_max/λ bounds the root from above; the rounding floor bounds it from below.
    high = np.log(values.size / dimension) + 1.0
    low = -60.0
    return top * float(np.exp(brentq(excess, low, high, xtol=1e-13, rtol=1e-13)))
