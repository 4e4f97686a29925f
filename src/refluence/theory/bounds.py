"""How wrong a sketched score can be: bounds for every pair of gradients in range(C).

With g = C^{1/2}u and C̃ = C^{1/2}PᵀPC^{1/2} the error of a sketch is τ̃ − τ = uᵀEu', E = λ[(C+λ)⁻¹ − (C̃+λ)⁻¹]
= λ(C+λ)^{-1/2}[I − (I+Δ)⁻¹](C+λ)^{-1/2}, where Δ = (C+λ)^{-1/2}(C̃−C)(C+λ)^{-1/2} is the *distortion*. Because
λuᵀ(C+λ)⁻¹u = τ_0(g,g) − τ_λ(g,g), the *gap*, the eigenvalues δ of Δ bound every error. A sketch at μ set against exact
scores at λ has Δ = (C+λ)^{-1/2}(C̃+μ−C−λ)(C+λ)^{-1/2} and I − (μ/λ)(I+Δ)⁻¹ in the brackets. Derivations: docs/theory.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from refluence.errors import RefluenceError
from refluence.theory.spectrum import Spectrum, as_spectrum

RANK_CUT = 1e-10


@dataclass(frozen=True)
class RangeNorms:
    """τ_0(g,g) and its gap τ_0(g,g) − τ_λ(g,g) of the part of each gradient in range(C)."""

    tau_0: Float[Tensor, " k"]
    gap: Float[Tensor, " k"]


def gap(tau_0: Float[Tensor, " k"], tau_lambda: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """τ_0(g,g) − τ_λ(g,g) = λuᵀ(C+λ)⁻¹u ≥ 0 of gradients in range(C), rounding below 0 set to 0.

    `range_norms` finds it from a Gram matrix without the difference.
    """
    return (tau_0 - tau_lambda).clamp(min=0.0)


def range_norms(
    gram: Float[Tensor, "n n"], damping: float, cross: Float[Tensor, "n k"] | None = None, cut: float = RANK_CUT
) -> RangeNorms:
    """τ_0 and gap of train gradients, or of the parts v_∥ of test gradients V in range(C), from K = GGᵀ/n.

    With K = Q diag(σ) Qᵀ and σ_i above the cut: train τ_0 = n Σ_i Q_ji², gap = n Σ_i Q_ji² λ/(σ_i+λ); test, with
    w = QᵀGv, τ_0 = (1/n) Σ_i w_i²/σ_i², gap = (1/n) Σ_i w_i²λ/(σ_i²(σ_i+λ)).

    Args:
        gram: K, float64.
        damping: λ > 0.
        cross: GVᵀ; None: the train gradients themselves.
        cut: eigenvalues up to cut·σ_max count as 0. τ_0 of test gradients depends on it: it is mostly made by the
            smallest eigenvalues kept.
    """
    _check_damping(damping)
    values, vectors = torch.linalg.eigh(gram.double())
    kept = values > cut * values.max()
    values, vectors, n = values[kept], vectors[:, kept], gram.shape[0]
    squares = n * vectors.square() if cross is None else (cross.double().T @ vectors).square() / (n * values.square())
    return RangeNorms(squares.sum(1), squares @ (damping / (values + damping)))


def distortion(
    gram: Float[Tensor, "n n"],
    sketched_gram: Float[Tensor, "n n"],
    damping: float,
    sketch_damping: float | None = None,
) -> Float[Tensor, " n"]:
    """Ascending eigenvalues δ > −1 of Δ = (C+λ)^{-1/2}(C̃−C)(C+λ)^{-1/2} on range(C), and zeros.

    From K = GGᵀ/n and K̃ = GPᵀPGᵀ/n: with G/√n = WC^{1/2} the polar form, K = WCWᵀ and K̃ = WC̃Wᵀ, so that Δ is
    similar to (K+λ)^{-1/2}(K̃−K)(K+λ)^{-1/2}. A sketch at another damping μ, as a corrected one has, is distorted by
    (C+λ)^{-1/2}(C̃+μ−C−λ)(C+λ)^{-1/2}, which is (μ−λ)/λ outside range(C).

    Args:
        gram: K.
        sketched_gram: K̃, with the same rows.
        damping: λ > 0.
        sketch_damping: μ > 0; None: λ.

    Raises:
        RefluenceError: K + λ is not positive definite in float64.
    """
    _check_damping(damping)
    own = damping if sketch_damping is None else sketch_damping
    _check_damping(own)
    K, eye = gram.double(), torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(K + damping * eye)
    if int(failed):
        raise RefluenceError(f"K + λ is not positive definite at λ = {damping:.3g}: use a larger damping")
    difference = sketched_gram.double() - K + (own - damping) * eye
    half = torch.linalg.solve_triangular(factor, difference, upper=False)
    whole = torch.linalg.solve_triangular(factor, half.T, upper=False)
    return torch.linalg.eigvalsh((whole + whole.T) / 2)


def distortion_factor(distortions: Float[Tensor, " n"], ratio: float = 1.0) -> float:
    """max_i |1 − ρ/(1+δ_i)|, the least f with |τ̃−τ| ≤ f·√gap(g)·√gap(g') for all g, g' in range(C).

    For ρ = 1 it is max_i |δ_i/(1+δ_i)|.

    Args:
        distortions: δ.
        ratio: ρ = μ/λ of a sketch at μ whose scores are set against the exact ones at λ.
    """
    return float((1.0 - ratio / (1.0 + distortions.double())).abs().max())


def pair_bounds(factor: float, gap_left: Float[Tensor, " k"], gap_right: Float[Tensor, " n"]) -> Float[Tensor, "k n"]:
    """f·√gap_i·√gap_j, which no |τ̃_ij − τ_ij| exceeds where f is the sketch's `distortion_factor`."""
    return factor * gap_left.sqrt()[:, None] * gap_right.sqrt()


def error_bound(epsilon: float, gap_left: Float[Tensor, " k"], gap_right: Float[Tensor, " n"]) -> Float[Tensor, "k n"]:
    """ε/(1−ε)·√(τ_0−τ_λ)(g,g)·√(τ_0−τ_λ)(g',g'), for a sketch with ‖Δ‖ ≤ ε (Theorem 2 of arXiv 2602.10449, sharper).

    The published form has τ_0 in place of the gaps.

    Args:
        epsilon: of ‖Δ‖, 0 ≤ ε < 1.
        gap_left: of the test gradients.
        gap_right: of the train gradients.
    """
    if not 0 <= epsilon < 1:
        raise RefluenceError(f"the bound needs a distortion 0 ≤ ε < 1, not {epsilon!r}: use a larger sketch")
    return pair_bounds(epsilon / (1.0 - epsilon), gap_left, gap_right)


def range_error(gram: Float[Tensor, "n n"], sketched_gram: Float[Tensor, "n n"], damping: float) -> float:
    """ε = ‖E‖: the largest |τ̃−τ|/(√τ_0(g,g)·√τ_0(g',g')) of all g, g' in range(C), at most 1.

    This is the ε of Theorem 2 of arXiv 2602.10449. E = λ[(K+λ)⁻¹ − (K̃+λ)⁻¹], which is 0 outside range(K).

    Args:
        gram: K = GGᵀ/n.
        sketched_gram: K̃ = GPᵀPGᵀ/n.
        damping: λ > 0.
    """
    _check_damping(damping)
    shift = damping * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    inverses = [torch.cholesky_inverse(torch.linalg.cholesky(M.double() + shift)) for M in (gram, sketched_gram)]
    return damping * float(torch.linalg.eigvalsh(inverses[0] - inverses[1]).abs().max())


def least_size(eigenvalues: Spectrum, damping: float, epsilon: float) -> int:
    """#{i: σ_i > λε/(1−ε)}: with fewer rows *every* P has an error above ε for some pair (Theorem 4, by instance).

    A unit u among the top m+1 eigenvectors with PC^{1/2}u = 0 has uᵀEu = −uᵀC(C+λ)⁻¹u ≤ −σ_{m+1}/(σ_{m+1}+λ).

    Args:
        eigenvalues: of C; zeros may be left out.
        damping: λ > 0.
        epsilon: of |τ̃−τ| ≤ ε√τ_0√τ_0', 0 < ε < 1.
    """
    _check_damping(damping)
    if not 0 < epsilon < 1:
        raise RefluenceError(f"epsilon must lie between 0 and 1, not {epsilon!r}: errors never exceed √τ_0√τ_0'")
    values: NDArray[np.float64] = as_spectrum(eigenvalues)
    return int((values > damping * epsilon / (1.0 - epsilon)).sum())


def _check_damping(damping: float) -> None:
    if not damping > 0:
        raise RefluenceError(f"damping must be > 0, not {damping!r}")
