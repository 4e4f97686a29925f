"""Leakage: what a sketched score makes of the part of a test gradient outside range(C).

For g in range(C) and v_⊥ in ker C the exact τ_λ(v_⊥, g) is 0; the sketch gives L = (Pv_⊥)ᵀ(PCPᵀ+λ)⁻¹Pg. For Gaussian
P, Pv_⊥ is independent of P on range(C) with entries N(0, ‖v_⊥‖²/m), so L given P on range(C) is N(0, ‖v_⊥‖²‖z‖²/m) with
z = (PCPᵀ+λ)⁻¹Pg. Statements: "A Unified Theory of Random Projection for Influence Functions", arXiv 2602.10449,
Theorems 8 and 9; their constants are derived in docs/theory.md.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.errors import RefluenceError
from refluence.theory.bounds import RANK_CUT


def kernel_norms(
    gram: Float[Tensor, "n n"],
    cross: Float[Tensor, "n k"],
    squared_norms: Float[Tensor, " k"],
    cut: float = RANK_CUT,
) -> Float[Tensor, " k"]:
    """‖v_⊥‖ of test gradients, v_⊥ outside range(C): ‖v_⊥‖² = ‖v‖² − (1/n) Σ_i (q_iᵀGv)²/σ_i, at least 0.

    Args:
        gram: K = GGᵀ/n = Q diag(σ) Qᵀ of the train gradients.
        cross: GVᵀ.
        squared_norms: ‖v‖².
        cut: eigenvalues up to cut·σ_max count as 0, so that what lies there is in the kernel. An eigenvalue near the
            cut is known to ε/cut = 2·10⁻⁶ of itself, so ‖v_⊥‖ below 10⁻³‖v‖ may be rounding.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    kept = values > cut * values.max()
    inside = (cross.double().T @ vectors[:, kept]).square() @ (1.0 / values[kept]) / gram.shape[0]
    return (squared_norms.double() - inside).clamp(min=0.0).sqrt()


def leakage_deviation(
    perpendicular_norms: Float[Tensor, " k"], solved_norms: Float[Tensor, " n"], size: int
) -> Float[Tensor, "k n"]:
    """‖v_⊥‖·‖z‖/√m, the standard deviation of the leakage of test i into its score with train gradient j.

    Args:
        perpendicular_norms: ‖v_⊥‖ of the tests.
        solved_norms: ‖(PCPᵀ+λ)⁻¹Pg_j‖ of the train gradients.
        size: m, the rows of the sketch.
    """
    return perpendicular_norms[:, None] * solved_norms / math.sqrt(size)


def pair_leakage_bound(
    perpendicular_norms: Float[Tensor, " k"],
    tau_0: Float[Tensor, " n"],
    damping: float,
    size: int,
    delta: float = 0.05,
    pairs: int = 1,
) -> Float[Tensor, "k n"]:
    """√(2 log(2p/δ)/m)·‖v_⊥‖·√τ_0(g,g)/(2√λ): no |L| of p pairs chosen beforehand exceeds it, with probability 1 − δ.

    By ‖z‖ ≤ √τ_0/(2√λ) and the normal tail, with a union bound over the pairs (Theorems 8 and 9).

    Args:
        perpendicular_norms: ‖v_⊥‖ of the tests.
        tau_0: τ_0(g,g) of the train gradients, n in the empirical Fisher of n independent ones.
        damping: λ > 0 at which the sketch is used.
        size: m, the rows of the sketch.
        delta: δ, the probability of a larger one.
        pairs: p, how many bounds are to hold together.
    """
    _check(damping, delta)
    quantile = math.sqrt(2.0 * math.log(2.0 * pairs / delta) / size)
    return quantile * perpendicular_norms[:, None] * tau_0.sqrt() / (2.0 * math.sqrt(damping))


def leakage_bound(
    perpendicular_norms: Float[Tensor, " k"],
    tau_0: Float[Tensor, " n"],
    damping: float,
    size: int,
    dimension: float,
    delta: float = 0.05,
) -> Float[Tensor, "k n"]:
    """‖v_⊥‖·√(τ_0/λ)·(√d + √(log(k/δ)/2))/√m: no |L| of k tests with *any* g in range(C) exceeds it, but for δ.

    sup_g |L|/√τ_0(g,g) is the norm of a Gaussian vector whose covariance has a trace of at most ‖v_⊥‖²d/(mλ) and a norm
    of at most ‖v_⊥‖²/(4mλ) (Theorem 8; for k tests Theorem 9).

    Args:
        perpendicular_norms: ‖v_⊥‖ of the tests.
        tau_0: τ_0(g,g) of the train gradients, n in the empirical Fisher of n independent ones.
        damping: λ > 0 at which the sketch is used.
        size: m, the rows of the sketch.
        dimension: d = Σ_j σ̃_j/(σ̃_j+λ) of the sketch, see `sketched_dimension`.
        delta: δ, the probability of a larger one.
    """
    _check(damping, delta)
    tail = math.sqrt(math.log(max(1, perpendicular_norms.shape[0]) / delta) / 2.0)
    factor = (math.sqrt(dimension) + tail) / math.sqrt(size * damping)
    return factor * perpendicular_norms[:, None] * tau_0.sqrt()


def factorised_leakage(
    solved: Float[Tensor, "a e"],
    kernel_range: Float[Tensor, "r e"],
    range_kernel: Float[Tensor, "a s"],
    kernel_norm: float,
) -> tuple[float, float, float]:
    """Standard deviations of the three parts of the leakage of v_⊥ with a sketch P_A ⊗ P_E of C = A ⊗ E.

    v_⊥ = N₁ + N₂ + N₃ in ker A ⊗ range E, range A ⊗ ker E, ker A ⊗ ker E; with Z the m_A × m_E matrix of (PCPᵀ+λ)⁻¹Pg
    they are ‖Z(N₁P_Eᵀ)ᵀ‖/√m_A, ‖Zᵀ(P_AN₂)‖/√m_E and ‖Z‖‖N₃‖/√(m_A m_E), Frobenius norms. The first is over P_A on ker A
    with all else fixed, the second over P_E on ker E, the third over both. So the first does not fall with m_E: the
    smaller factor governs.

    Args:
        solved: Z.
        kernel_range: N₁P_Eᵀ, in an orthonormal basis of ker A (r rows) or in all d_A coordinates.
        range_kernel: P_AN₂, in an orthonormal basis of ker E (s columns) or in all d_E coordinates.
        kernel_norm: ‖N₃‖.
    """
    size_a, size_e = solved.shape
    first = torch.linalg.matrix_norm(solved @ kernel_range.T) / math.sqrt(size_a)
    second = torch.linalg.matrix_norm(solved.T @ range_kernel) / math.sqrt(size_e)
    third = torch.linalg.matrix_norm(solved) * kernel_norm / math.sqrt(size_a * size_e)
    return float(first), float(second), float(third)


def _check(damping: float, delta: float) -> None:
    if not (damping > 0 and 0 < delta < 1):
        raise RefluenceError(f"damping must be > 0 and delta between 0 and 1, not {damping!r} and {delta!r}")
