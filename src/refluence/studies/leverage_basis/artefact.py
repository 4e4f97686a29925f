"""What leverage from unpivoted QR in float32 makes of pixels that are zero in every image."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.evaluation.rankings import kendall_tau, ordering, overlaps
from refluence.studies.leverage_basis.agreement import top_of

NEAR_ONE = 0.99
FIRST = 20
PLACES = (60, 300, 1_000)


def unpivoted_leverage(X: Float64[Tensor, "n d"]) -> Float64[Tensor, " n"]:
    """‖q_i‖² of the rows of Q in X = QR, in float32 without pivoting: wrong where X has no full rank.

    The reflector of a zero column is the identity, so that Q gets a column e_j there and row j a leverage of 1.
    """
    return torch.linalg.qr(X.float()).Q.double().square().sum(dim=1)


def artefact(X: Float64[Tensor, "n d"], right: Float64[Tensor, " n"]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The wrong leverage, and how it differs from the right one."""
    wrong = unpivoted_leverage(X)
    common = overlaps(wrong, right)
    ours = ordering(wrong)
    places = sorted({k for k in PLACES if k < len(X)} | {top_of(len(X))})
    return {"wrong": wrong}, {
        "sum_wrong": float(wrong.sum()),
        "sum_right": float(right.sum()),
        "near_one_wrong": int((wrong > NEAR_ONE).sum()),
        "near_one_right": int((right > NEAR_ONE).sum()),
        "spurious": int(((wrong > NEAR_ONE) & (right < 0.5)).sum()),
        "first_rows": int((wrong[:FIRST] > NEAR_ONE).sum()),
        "first_rows_right": int((right[:FIRST] > NEAR_ONE).sum()),
        "tau": kendall_tau(wrong, right),
        "overlap": {str(k): int(common[k - 1]) / k for k in places},
        "highest_row": int(ours[0]),
    }
