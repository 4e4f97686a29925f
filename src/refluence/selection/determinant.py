"""Rows that span the largest volume: greedy D-optimal design, and its limit without a ridge, pivoted QR."""

from __future__ import annotations

import math

import scipy.linalg
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from refluence.errors import DataError
from refluence.progress import track

WIDTH = 64


def d_optimal(X: Float64[Tensor, "n d"], k: int, ridge: float, *, progress: bool = True) -> Int64[Tensor, " k"]:
    """Greedy D-optimal design: each step takes the row that adds most to log det(nλI + X_SᵀX_S), the lowest on ties.

    The gain of row i is log(1 + q_i), q_i = x_iᵀ(nλI + X_SᵀX_S)⁻¹x_i: the ridge leverage that it would have over the
    rows chosen. q only falls, so a row is looked at again only when its last known q is the largest (Minoux 1978):
    exact greedy, at no more than n·d multiply-adds a step and mostly far fewer.

    Args:
        ridge: λ, in units of XᵀX/n, above 0.

    Raises:
        DataError: a ridge that is not positive and finite.
    """
    if not (math.isfinite(ridge) and ridge > 0):
        raise DataError(f"D-optimal selection needs a ridge above 0, not {ridge!r}; pivoted_qr is its limit at 0")
    n, d = X.shape
    floor = n * ridge
    gains = X.square().sum(dim=1) / floor
    seen = torch.zeros(n, dtype=torch.int64)
    chosen = torch.zeros(k, dtype=torch.int64)
    # (nλI + X_SᵀX_S)⁻¹ = I/(nλ) − VᵀV, a row of V for each row chosen.
    V = torch.zeros(k, d, dtype=X.dtype)
    for step in track(range(k), "D-optimal design", enabled=progress):
        width = WIDTH
        while seen[row := int(gains.argmax())] < step:
            _refresh(X, V, gains, seen, gains.topk(min(width, n)).indices, step)
            width *= 2
        chosen[step] = row
        u = X[row] / floor - V[:step].T @ (V[:step] @ X[row])
        V[step] = u / (1 + X[row] @ u).sqrt()
        gains[row] = -1.0
        seen[row] = k
    return chosen


def _refresh(X: Tensor, V: Tensor, gains: Tensor, seen: Tensor, rows: Tensor, step: int) -> None:
    """Bring q of these rows up to date: q_i −= Σ (x_iᵀv_s)² over the steps s since it was last known."""
    rows = rows[seen[rows] < step]
    if len(rows) == 0:
        return
    first = int(seen[rows].min())
    missed = (X[rows] @ V[first:step].T).square()
    missed *= torch.arange(first, step) >= seen[rows, None]
    gains[rows] = (gains[rows] - missed.sum(dim=1)).clamp(min=0)
    seen[rows] = step


def pivoted_qr(X: Float64[Tensor, "n d"], k: int) -> Int64[Tensor, " k"]:
    """The first k pivots of QR with column pivoting of Xᵀ: each takes the row farthest from the span of those before.

    This is greedy maximisation of det X_S X_Sᵀ, and D-optimal design as λ → 0.

    Raises:
        DataError: k above the numerical rank of X, σ > max(n, d)·ε·σ₁ on the diagonal of R.

    Source: Businger & Golub 1965.
    """
    R, pivots = scipy.linalg.qr(X.T.numpy(), mode="r", pivoting=True, check_finite=False)
    diagonal = torch.from_numpy(R.diagonal().copy()).abs()
    rank = int((diagonal > max(X.shape) * torch.finfo(X.dtype).eps * diagonal[0]).sum())
    if k > rank:
        raise DataError(f"pivoted QR orders as many rows as the rank, {rank}, not {k}: use d_optimal with a ridge")
    return torch.from_numpy(pivots[:k].astype("int64"))
