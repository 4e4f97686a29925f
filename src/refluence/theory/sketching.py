"""The damping that a sketch adds of its own.

τ̃ at damping μ has the mean of the exact τ at κ > μ with μ = κ(1 − d/m), where d = Σ_j σ̃_j/(σ̃_j+μ) is the sketch's own
effective dimension at μ, which equals the exact one at κ (LeJeune et al., "Asymptotics of the Sketched Pseudoinverse",
2022). So κ and the μ for a wanted κ follow from the sketched spectrum alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from refluence.errors import RefluenceError, SketchSizeError
from refluence.theory.spectrum import Spectrum, as_numbers, as_spectrum, effective_dimension


def implied_damping(eigenvalues: Spectrum, size: int, damping: float) -> float:
    """κ that the scores of a sketch of m = `size` rows at `damping` μ estimate: κ = μ / (1 − d/m).

    Args:
        eigenvalues: of PCPᵀ; zeros may be left out.
        size: m, the rows of the sketch.
        damping: μ > 0, or 0 where all m eigenvalues are positive.

    Raises:
        RefluenceError: an eigenvalue σ̃_j + μ that is not positive.
    """
    return 1.0 / float((1.0 / _shifted(eigenvalues, size, damping)).mean())


def corrected_damping(eigenvalues: Spectrum, size: int, target: float) -> float:
    """The μ at which a sketch of m = `size` rows gives scores that estimate those at κ = `target`.

    Args:
        eigenvalues: of PCPᵀ; zeros may be left out. Those of an indefinite C may be negative: μ is then above −σ̃_min.
        size: m, the rows of the sketch.
        target: κ > 0, the damping wanted of the values.

    Raises:
        RefluenceError: κ is not above the harmonic mean of the m eigenvalues: the sketch is too small for it.
    """
    if not 0 < target < np.inf:
        raise RefluenceError(f"the damping that a sketch is to estimate must be > 0 and finite, not {target!r}")
    values = _padded(eigenvalues, size)

    def excess(log_ratio: float) -> float:
        return float((target / (values + target * np.exp(log_ratio))).mean()) - 1.0

    if (smallest := float(values.min())) < 0:
        low, high = np.log(-smallest / target * (1 + 1e-9)), np.log(1.0 - smallest / target)
        return target * float(np.exp(brentq(excess, low, high, xtol=1e-13, rtol=1e-13)))
    low = -50.0
    if excess(low) <= 0:
        wanted = 2 * effective_dimension(values, target)
        raise SketchSizeError(
            f"a sketch of m = {size} rows cannot estimate scores at damping {target:.3g}: it adds more damping of its "
            f"own, {1.0 / float((1.0 / np.maximum(values, np.finfo(float).tiny)).mean()):.3g}. Try m = "
            f"{max(2 * size, 2 * int(np.ceil(wanted)))}, or a larger damping"
        )
    return target * float(np.exp(brentq(excess, low, 0.0, xtol=1e-13, rtol=1e-13)))


def sketched_dimension(eigenvalues: Spectrum, size: int, damping: float) -> tuple[float, float]:
    """(κ, d_κ): what a sketch of m = `size` rows at `damping` μ says of C, d_κ = Σ_j σ̃_j/(σ̃_j+μ) = m(1 − μ/κ).

    The sum is the sketch's own dimension at μ and C's at κ, up to an error of order 1 that does not grow with m
    (LeJeune et al. 2022, Theorem 4.1).

    Args:
        eigenvalues: of PCPᵀ; zeros may be left out.
        size: m, the rows of the sketch.
        damping: μ > 0.
    """
    values = _padded(eigenvalues, size)
    # The sum, because m(1 − μ/κ) cancels where d_κ is small.
    return implied_damping(values, size, damping), float((values / (values + damping)).sum())


def sketch_variance_scale(eigenvalues: Spectrum, size: int, damping: float) -> float:
    """κ²/(mκ') = 1/Σ_j (σ̃_j+μ)⁻², with Var τ̃_ij = κ²/(mκ')·(s_ii s_jj + s_ij²) for s_ij = (Pv_i)ᵀ(PCPᵀ+μ)⁻²(Pg_j).

    Args:
        eigenvalues: of PCPᵀ; zeros may be left out.
        size: m, the rows of the sketch.
        damping: μ ≥ 0; at 0 all m eigenvalues must be positive.

    Raises:
        RefluenceError: an eigenvalue σ̃_j + μ that is not positive.
    """
    return 1.0 / float((_shifted(eigenvalues, size, damping) ** -2.0).sum())


def _shifted(eigenvalues: Spectrum, size: int, damping: float) -> NDArray[np.float64]:
    """σ̃_j + μ of all m eigenvalues."""
    values = _padded(eigenvalues, size) + damping
    if not damping >= 0 or not values.min() > 0:
        raise RefluenceError(f"damping must be > 0, not {damping!r}, unless the sketched curvature has full rank")
    return values


def _padded(eigenvalues: Spectrum, size: int) -> NDArray[np.float64]:
    """All m eigenvalues, with the zeros that were left out."""
    values = as_numbers(eigenvalues)
    if values.min() >= -1e-6 * values.max():
        values = as_spectrum(values)
    if values.size > size:
        raise RefluenceError(f"a sketch of m = {size} rows has no {values.size} eigenvalues")
    return np.concatenate([values, np.zeros(size - values.size)])
