"""How many rows of each class."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor


def quotas(sizes: Int64[Tensor, " c"], k: int) -> Int64[Tensor, " c"]:
    """k split over classes as evenly as their sizes allow: no class gets two more than another that has rows left.

    What does not divide evenly goes to the first classes with rows left.
    """
    given = torch.zeros_like(sizes)
    while (left := k - int(given.sum())) > 0:
        open_ = (given < sizes).nonzero()[:, 0]
        each = left // len(open_)
        if each == 0:
            given[open_[:left]] += 1
        else:
            given[open_] = torch.minimum(given[open_] + each, sizes[open_])
    return given
