"""The barrier of undamped scores: a sketch must keep every dimension of range(C).

At λ = 0, τ̃ = τ for all gradients in range(C) if and only if P is injective there, rank(PU) = r for a basis U of
range(C); so m ≥ r ("A Unified Theory of Random Projection for Influence Functions", arXiv 2602.10449, Theorem 1).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.errors import RefluenceError


def injective(sketched: Float[Tensor, "a b"], rank: int, cut: float | None = None) -> bool:
    """Whether P is injective on range(C): rank(PU) = r.

    Args:
        sketched: GPᵀ (n, m) of gradients G whose rows span range(C), or PU (m, r) of a basis U: their ranks agree.
        rank: r = rank(C), found with the same cut.
        cut: singular values up to cut·‖sketched‖ count as 0; None: max(a, b)·ε of the dtype.
    """
    return lost_dimensions(sketched, rank, cut) == 0


def lost_dimensions(sketched: Float[Tensor, "a b"], rank: int, cut: float | None = None) -> int:
    """r − rank(PU): the dimension of the gradients g ≠ 0 in range(C) with Pg = 0, whose undamped scores become 0.

    Args:
        sketched: GPᵀ (n, m) or PU (m, r), as in `injective`.
        rank: r = rank(C), found with the same cut.
        cut: singular values up to cut·‖sketched‖ count as 0; None: max(a, b)·ε of the dtype.

    Raises:
        RefluenceError: the sketched rows have more dimensions than `rank`, so that it cannot be their rank.
    """
    values = torch.linalg.svdvals(sketched.double())
    if cut is None:
        cut = max(sketched.shape) * torch.finfo(sketched.dtype).eps
    kept = int((values > cut * values.max()).sum())
    if kept > rank:
        raise RefluenceError(
            f"the sketched rows have rank {kept}, more than rank = {rank}: give C's rank at the cut {cut:.1e}"
        )
    return rank - kept
