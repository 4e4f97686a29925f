"""Effective dimension where the spectrum is out of reach, with an interval: from products with C, or from some rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.special import stdtrit
from torch import Tensor

from refluence.errors import RefluenceError
from refluence.linalg.lanczos import Tridiagonal, lanczos
from refluence.linalg.maps import Apply
from refluence.linalg.quadrature import gauss_rules, sign_columns
from refluence.theory.spectrum import SpectralMeasure

FLOOR = 1e-10


@dataclass(frozen=True)
class DimensionEstimate:
    """d_λ with an interval; `float(estimate)` is its value."""

    value: float
    low: float
    high: float
    confidence: float

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class StochasticSpectrum:
    """Quadratures of tr f(C) ≈ d·mean_i Σ_j weight_ij f(node_ij) for k random sign vectors, for every λ.

    For f(σ) = σ/(σ+λ) the Gauss rules lie above the exact zᵢᵀf(C)zᵢ and the Gauss–Radau rules below it.

    Args:
        d: the size of C.
        nodes, weights: of the Gauss rules, (k, m).
        radau_nodes, radau_weights: of rules with a node fixed just below 0, (k, m + 1).
    """

    d: int
    nodes: Float[Tensor, "k m"]
    weights: Float[Tensor, "k m"]
    radau_nodes: Float[Tensor, "k l"]
    radau_weights: Float[Tensor, "k l"]

    @property
    def measure(self) -> SpectralMeasure:
        """The Gauss rules as one measure, for `effective_dimension` and `damping_for`."""
        values = self.nodes.clamp(min=0.0).flatten().cpu().numpy()
        counts = (self.weights * (self.d / len(self.nodes))).flatten().cpu().numpy()
        return SpectralMeasure(values, counts)

    def effective_dimension(self, damping: float, confidence: float = 0.95) -> DimensionEstimate:
        """d_λ; the interval is Student's over the vectors, around the bracket of the quadrature.

        Raises:
            RefluenceError: λ is not above the rounding of C, 10⁻⁹‖C‖, or a confidence outside (0, 1).
        """
        floor = 10 * FLOOR * float(self.nodes.max())
        if not (damping > floor and 0 < confidence < 1):
            raise RefluenceError(
                f"damping must be above {floor:.3g} and confidence between 0 and 1, not {damping!r} and {confidence!r}"
            )
        above = self.d * (self.weights * (self.nodes / (self.nodes + damping))).sum(1)
        below = self.d * (self.radau_weights * (self.radau_nodes / (self.radau_nodes + damping))).sum(1)
        k = len(above)
        quantile = float(stdtrit(k - 1, (1 + confidence) / 2)) / math.sqrt(k)
        low = float(below.mean()) - quantile * float(below.std())
        high = float(above.mean()) + quantile * float(above.std())
        value = float((above.mean() + below.mean()) / 2)
        return DimensionEstimate(value, max(0.0, low), min(float(self.d), high), confidence)


def stochastic_spectrum(
    apply: Apply,
    d: int,
    probes: int = 12,
    steps: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> StochasticSpectrum:
    """Lanczos quadrature of C ⪰ 0 known by its products (Ubaru, Chen & Saad 2017; Golub & Meurant 2010, chapter 6).

    The standard error of d_λ is at most √(2/(k·d_λ)) of it.

    Args:
        apply: V ↦ CV.
        d: the size of C.
        probes: k ≥ 2, random sign vectors.
        steps: m, products with k columns.
        seed: of the vectors.
        dtype: of the products.
        device: where they are made.
    """
    if probes < 2:
        raise RefluenceError(f"an interval needs at least 2 probes, not {probes!r}")
    found = lanczos(apply, sign_columns(d, probes, seed, dtype, device), steps)
    return StochasticSpectrum(d, *gauss_rules(found), *gauss_rules(_with_node_below_zero(found)))


def stochastic_effective_dimension(
    apply: Apply,
    d: int,
    damping: float,
    probes: int = 12,
    steps: int = 64,
    seed: int = 0,
    confidence: float = 0.95,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> DimensionEstimate:
    """d_λ = tr C(C+λ)⁻¹ of C ⪰ 0 known by its products; `stochastic_spectrum` for one λ.

    Args:
        apply: V ↦ CV.
        d: the size of C.
        damping: λ > 0.
        probes: k ≥ 2, random sign vectors.
        steps: m, products with k columns; too few widen the interval.
        seed: of the vectors.
        confidence: of the interval.
        dtype: of the products.
        device: where they are made.
    """
    return stochastic_spectrum(apply, d, probes, steps, seed, dtype, device).effective_dimension(damping, confidence)


def subsampled_effective_dimension(
    gram: Float[Tensor, "N N"], damping: float, population: int | None = None, confidence: float = 0.95
) -> DimensionEstimate:
    """d_λ of C = (1/n) Σ g gᵀ from N of its rows drawn at random without replacement.

    The interval needs no assumption on the spectrum. With C_S of the N rows, E d_λ(C_S) ≤ d_λ ≤ E tr C(C_S+λ)⁻¹,
    because tr C(C+λ)⁻¹ is concave and the inverse convex; the right side is N/n of d_λ(C_S) and 1 − N/n of the mean
    score gᵢᵀ(C_{−i}+λ)⁻¹gᵢ of each row in the others. Each end is moved out by Student's quantile times its standard
    error (jackknife; delta method), reduced by √(1−N/n). It is too narrow where a few rows that make up much of C are
    missing from the sample. The value takes the rows as a random compression of K:
    d_μ(C_S) = d_κ(C) at κ = (N/n)μ + (1−N/n)μ/(1 − d_μ(C_S)/N), solved for κ = λ; it is too low where the norms of the
    rows are very unequal. Derivations and coverage: docs/theory.md.

    Args:
        gram: G_S G_Sᵀ/N, float64.
        damping: λ > 0.
        population: n ≥ N; None: infinite.
        confidence: of the interval.

    Raises:
        RefluenceError: fewer than 3 rows, or fewer than the value needs; a wrong damping, population or confidence.
    """
    N = gram.shape[0]
    if not (damping > 0 and 0 < confidence < 1):
        raise RefluenceError(f"damping must be > 0 and confidence between 0 and 1, not {damping!r} and {confidence!r}")
    if N < 3 or (population is not None and population < N):
        raise RefluenceError(f"needs at least 3 rows and a population of no fewer, not {N} rows of {population}")
    share = 0.0 if population is None else N / population
    values, vectors = torch.linalg.eigh(gram.double())
    values = values.clamp(min=0.0)
    within = float((values / (values + damping)).sum())
    # B = (G_S G_Sᵀ + λ')⁻¹ at λ' = (N−1)λ holds every leave-one-out quantity.
    shift, inverse = (N - 1) * damping, 1.0 / (N * values + (N - 1) * damping)
    B, B2 = vectors.square() @ inverse, vectors.square() @ inverse.square()
    deleted = N - 1 - shift * (inverse.sum() - B2 / B)
    held_out = 1.0 / (damping * B) - (N - 1)
    slopes = (B - shift * B2) / (damping * B.square())
    quantile = float(stdtrit(N - 1, (1 + confidence) / 2)) * math.sqrt(1 - share)
    low = within - quantile * math.sqrt((N - 1) ** 2 / N) * float(deleted.std())
    high = share * within + (1 - share) * float(held_out.mean()) + quantile * float(slopes.std()) / math.sqrt(N)
    value = _compressed_dimension(values.cpu().numpy(), damping, share)
    low = max(0.0, low)
    return DimensionEstimate(min(max(value, low), high), low, high, confidence)


def _compressed_dimension(values: np.ndarray, damping: float, share: float) -> float:
    def excess(log_ratio: float) -> float:
        mu = damping * math.exp(log_ratio)
        left = float((mu / (values + mu)).mean())
        return share * mu + (1 - share) * mu / left - damping

    if excess(-50.0) > 0:
        raise RefluenceError(
            f"{len(values)} rows are too few for d_λ at damping {damping:.3g}: draw at least {2 * len(values)}, "
            "or use a larger damping"
        )
    mu = damping * math.exp(brentq(excess, -50.0, 0.0, xtol=1e-12)) if excess(0.0) > 0 else damping
    return float((values / (values + mu)).sum())


def _with_node_below_zero(found: Tridiagonal) -> Tridiagonal:
    """The Gauss–Radau rules' matrices: one more row with the diagonal that makes a = −FLOOR·‖C‖ an eigenvalue."""
    matrices, (k, m) = found.matrices(), found.diagonal.shape
    # On a common grade the last row couples; a start whose Krylov space has ended has residual 0 and keeps its grade.
    a = -FLOOR * (float(found.diagonal.max()) or 1.0)  # of C = 0 any node below 0 will do
    last = torch.zeros(k, m, 1, dtype=matrices.dtype, device=matrices.device)
    last[:, -1] = 1.0
    shifted = matrices - a * torch.eye(m, dtype=matrices.dtype, device=matrices.device)
    corner = torch.linalg.solve(shifted, last)[:, -1, 0]
    diagonal = torch.cat([found.diagonal, (a + found.residuals.square() * corner)[:, None]], dim=1)
    off_diagonal = torch.cat([found.off_diagonal, found.residuals[:, None]], dim=1)
    grades = torch.where(found.residuals > 0, m + 1, found.grades)
    no_basis = found.basis.new_empty(m + 1, k, 0)
    return Tridiagonal(diagonal, off_diagonal, grades, torch.zeros_like(found.residuals), no_basis)
