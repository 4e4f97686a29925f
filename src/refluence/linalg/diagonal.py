"""The diagonal of a map that can only be multiplied with."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from refluence.linalg.maps import Apply
from refluence.sketches.random_bits import random_bits

BITS = 64
TILE_COLUMNS = 32


def hutchinson_diagonal(
    apply: Apply, d: int, probes: int, seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[Float64[Tensor, " d"], Float64[Tensor, " d"]]:
    """(mean of z ∘ Az over random signs z, its standard errors): unbiased for diag A, exact for a diagonal A.

    The variance of one probe is Σ_{j≠i} A_ij². With one probe the standard errors are unknown: infinite.

    Source: Bekas, Kokiopoulou & Saad (2007), An estimator for the diagonal of a matrix.
    """
    total = torch.zeros(d, dtype=torch.float64, device=device)
    squares = torch.zeros_like(total)
    pivot = None
    for start in range(0, probes, TILE_COLUMNS):
        signs = torch.stack([random_signs(seed, j, d, device) for j in range(start, min(start + TILE_COLUMNS, probes))])
        columns = signs.to(dtype).T
        values = (columns * apply(columns)).double()
        if pivot is None:
            pivot = values[:, 0].clone()
        values -= pivot[:, None]
        total += values.sum(dim=1)
        squares += values.square().sum(dim=1)
    assert pivot is not None, f"hutchinson_diagonal needs a probe at least, not {probes}"
    if probes == 1:
        return pivot, torch.full_like(pivot, torch.inf)
    mean = total / probes
    variance = (squares / probes - mean.square()).clamp_min(0) / (probes - 1)
    return pivot + mean, variance.sqrt()


def random_signs(seed: int, stream: int, count: int, device: torch.device) -> Float[Tensor, " count"]:
    """±1 in float32, a function of (seed, stream, index) alone."""
    bits = random_bits(seed, stream, 0, -(-count // BITS), device)
    return (1 - 2 * ((bits[:, None] >> torch.arange(BITS, device=device)) & 1)).flatten()[:count].float()
