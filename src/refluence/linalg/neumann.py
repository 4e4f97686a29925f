"""The Neumann series of an inverse, summed by a recursion (LiSSA)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.errors import SolverError
from refluence.linalg.lanczos import ends_steps
from refluence.linalg.lockstep import run
from refluence.linalg.maps import Apply

ROUNDING = 1e-3
CHECK_EVERY = 4
ADVICE_STEPS = 30


def neumann_solve(
    apply: Apply,
    vectors: Float[Tensor, "d k"],
    scale: float,
    depth: int,
    slack: float = 1.0 + ROUNDING,
    remedy: Callable[[], str] | None = None,
    track: Callable[[range], Iterable[int]] = iter,
    label: str | None = None,
) -> Float[Tensor, "d k"]:
    """A⁻¹V ≈ (1/scale) Σ_{t ≤ depth} (I − A/scale)ᵗ V, by s ← v + s − (A s)/scale from s = v, all columns at once.

    Converges for 0 < eigenvalues of A < 2·scale; a component of eigenvalue σ is left short by (1 − σ/scale)^(depth+1).
    Then ‖s_t‖ ≤ (t + 1)‖v‖, so the first step past that proves divergence.
    Agarwal, Bullins & Hazan 2017 (arXiv 1602.03943), Koh & Liang 2017 (arXiv 1703.04730), §3.

    Args:
        apply: v ↦ Av; may be another unbiased sample of A at each call.
        vectors: V.
        scale: at least half the largest eigenvalue of A; the largest itself leaves no component oscillating.
        depth: steps, one product with k columns each.
        slack: by how much a sampled A may pass the bound.
        label: the scale as errors name it, where `apply` is scaled already.
        track: shows the steps as they are taken.
        remedy: the end of the error's message; by default the scale that would work, measured.

    Raises:
        SolverError: the recursion diverges.
    """
    sums = vectors.clone()
    norms = torch.linalg.vector_norm(vectors, dim=0, dtype=torch.float64)
    for t in track(range(1, depth + 1)):
        sums.sub_(apply(sums), alpha=1.0 / scale).add_(vectors)
        # Reading a number back waits for the device.
        if t % CHECK_EVERY == 0 or t == depth:
            sizes = torch.linalg.vector_norm(sums, dim=0, dtype=torch.float64)
            if not bool((sizes <= slack * (t + 1) * norms).all()):
                advice = (remedy or (lambda: scale_advice(apply, vectors)))()
                raise SolverError(f"LiSSA diverges within {t} steps at scale {label or f'{scale:.4g}'}: {advice}")
    return sums.div_(scale)


def neumann_depth(smallest: float, scale: float, tolerance: float) -> int:
    """The steps after which (1 − σ_min/scale)^(depth+1) ≤ tolerance, for σ_max ≤ scale."""
    ratio = min(smallest / scale, 1.0 - 1e-12)
    return max(0, int(torch.ceil(torch.tensor(tolerance).double().log() / torch.tensor(-ratio).double().log1p())) - 1)


def scale_advice(apply: Apply, like: Float[Tensor, "d k"]) -> str:
    """What to change, from the measured extreme eigenvalues."""
    ends = run(ends_steps(like.shape[0], 0, ADVICE_STEPS, like.dtype, like.device), apply)
    return advice_for(ends.low, ends.high + ends.margin)


def advice_for(low: float, high: float) -> str:
    """What to change, where `low` is a Ritz value and `high` an upper bound."""
    # Rounding leaves a singular map with a Ritz value a little below zero.
    if low < -1e-6 * abs(high):
        return (
            f"curvature + damping has an eigenvalue of {low:.3g} or less, and no scale works below 0: use a damping "
            f"larger by more than {-low:.3g}, or a Fisher or GGN curvature"
        )
    return f"the largest eigenvalue of curvature + damping is {high:.4g}: use a scale of at least that"
