"""Factorised sketches P_A ⊗ P_E of a curvature C = A ⊗ E ("A Unified Theory …", arXiv 2602.10449, Theorems 5 and 6).

At λ = 0 such a sketch is exact if and only if P_A is injective on range(A) and P_E on range(E), because ranks multiply:
(P_A ⊗ P_E)(U_A ⊗ U_E) = P_A U_A ⊗ P_E U_E. At λ > 0 each factor is to hold its own effective dimension, at a damping
in its own units.
"""

from __future__ import annotations

import numpy as np

from refluence.errors import RefluenceError
from refluence.theory.spectrum import Spectrum, as_spectrum, effective_dimension


def factor_dampings(eigenvalues_a: Spectrum, eigenvalues_e: Spectrum, damping: float) -> tuple[float, float]:
    """(λ_E, λ_A) = (λ/‖E‖, λ/‖A‖): λ_E damps A and λ_A damps E, so that λ_E·I⊗E ⪯ λI and λ_A·A⊗I ⪯ λI.

    Args:
        eigenvalues_a: of A; zeros may be left out.
        eigenvalues_e: of E; zeros may be left out.
        damping: λ ≥ 0 of A ⊗ E.

    Raises:
        RefluenceError: a factor is 0, or a negative damping.
    """
    if not damping >= 0:
        raise RefluenceError(f"damping must be ≥ 0, not {damping!r}")
    norms = {name: float(as_spectrum(v).max()) for name, v in (("A", eigenvalues_a), ("E", eigenvalues_e))}
    for name, norm in norms.items():
        if norm == 0:
            raise RefluenceError(f"the factor {name} is 0: no sketch of A ⊗ E is needed")
    return damping / norms["E"], damping / norms["A"]


def factor_dimensions(eigenvalues_a: Spectrum, eigenvalues_e: Spectrum, damping: float) -> tuple[float, float]:
    """(d_{λ_E}(A), d_{λ_A}(E)): the factor sketches need m_A ≳ d_{λ_E}(A)/ε² and m_E ≳ d_{λ_A}(E)/ε² rows (Thm 6).

    For λ ≤ ‖A‖‖E‖ their product is at least d_λ(A⊗E)/3.

    Args:
        eigenvalues_a: of A; zeros may be left out.
        eigenvalues_e: of E; zeros may be left out.
        damping: λ ≥ 0 of A ⊗ E.
    """
    damping_a, damping_e = factor_dampings(eigenvalues_a, eigenvalues_e, damping)
    return effective_dimension(eigenvalues_a, damping_a), effective_dimension(eigenvalues_e, damping_e)


def kronecker_dimension(eigenvalues_a: Spectrum, eigenvalues_e: Spectrum, damping: float) -> float:
    """d_λ(A⊗E) = Σ_ij α_iγ_j/(α_iγ_j + λ).

    Args:
        eigenvalues_a: α of A; zeros may be left out.
        eigenvalues_e: γ of E; zeros may be left out.
        damping: λ ≥ 0.
    """
    return effective_dimension(np.outer(as_spectrum(eigenvalues_a), as_spectrum(eigenvalues_e)).ravel(), damping)


def kronecker_distortion(epsilon: float, ratio: float = 1.0) -> float:
    """2ε + (2 + max(1, ρ))ε² ≥ ‖Δ‖ of A ⊗ E, where each factor's ‖Δ‖ ≤ ε; 2ε + 3ε² for λ ≤ ‖A‖‖E‖ (Theorem 6).

    The factors' distortions are at the dampings of `factor_dampings`.

    Args:
        epsilon: ≥ 0, of both factors.
        ratio: ρ = λ/(‖A‖‖E‖).
    """
    if not (epsilon >= 0 and ratio >= 0):
        raise RefluenceError(f"epsilon and ratio must be ≥ 0, not {epsilon!r} and {ratio!r}")
    return 2.0 * epsilon + (2.0 + max(1.0, ratio)) * epsilon**2
