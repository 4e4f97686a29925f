"""When two computations of the same gradient agree."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference that rounding explains; a wrong gradient differs by far more."""
    return {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 5e-2)


def noise(dtype: torch.dtype) -> float:
    """Rounding of a parameter's gradient, relative to that of all parameters together."""
    return 8 * torch.finfo(dtype).eps


def agree(rows: Float[Tensor, "n d"], expected: Float[Tensor, "n d"], whole: Float[Tensor, " n"]) -> bool:
    """Whether rows of a parameter's gradients are the expected ones; `whole` are the norms over all parameters."""
    allowed = tolerance(expected.dtype) * expected.double().norm(dim=1) + noise(expected.dtype) * whole
    return bool(((rows.double() - expected.double()).norm(dim=1) <= allowed).all())
