"""The linear head: ridge regression on one-hot labels in a basis, trained on selected rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64
from torch import Tensor

from refluence.progress import track
from refluence.studies.leverage_basis.arms import Arm, Chooser
from refluence.studies.leverage_basis.bases import Basis
from refluence.studies.leverage_basis.networks import CLASSES

RATIO = 1e-2
"""λ over the mean eigenvalue of the selected rows' covariance."""
MODEL = "linear head"

Head = tuple[Float64[Tensor, "d c"], Float64[Tensor, " c"]]


def fit(X: Float64[Tensor, "k d"], y: Int64[Tensor, " k"], weights: Float64[Tensor, " k"]) -> Head:
    """(B, b) of least squares on one-hot labels with an intercept, Σ w_i‖Bᵀx_i + b − e_i‖²/Σw + λ‖B‖².

    λ is `RATIO` times the mean eigenvalue of the weighted covariance of X.
    """
    targets = F.one_hot(y, CLASSES).double()
    share = (weights / weights.sum())[:, None]
    x_mean, t_mean = (share * X).sum(dim=0), (share * targets).sum(dim=0)
    centred = X - x_mean
    gram = centred.T @ (share * centred)
    ridge = RATIO * float(gram.diagonal().mean())
    # Rows that are all alike have no covariance: the head is then its intercept.
    gram.diagonal().add_(ridge if ridge > 0 else 1.0)
    B = torch.cholesky_solve(centred.T @ (share * (targets - t_mean)), torch.linalg.cholesky(gram))
    return B, t_mean - x_mean @ B


def accuracy(head: Head, X: Float64[Tensor, "n d"], y: Int64[Tensor, " n"]) -> float:
    """The share of rows whose class has the highest output."""
    return float(((X @ head[0] + head[1]).argmax(dim=1) == y).double().mean())


def head_results(
    basis: Basis,
    features: Float64[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    chooser: Chooser,
    arms: Sequence[Arm],
    sizes: Sequence[int],
    seeds: Sequence[int],
    progress: bool,
) -> list[dict[str, Any]]:
    """One record an arm, size and seed; arms that choose the same rows for every seed have the first alone."""
    n = len(chooser.labels)
    records = []
    jobs = [
        (arm, k, seed)
        for arm in arms
        for k in sizes
        if k < n or arm is arms[0]  # of the whole train set all arms are one
        for seed in (seeds if arm.is_random and k < n else seeds[:1])
    ]
    for arm, k, seed in track(jobs, f"linear heads on {basis.label}", enabled=progress):
        if (found := chooser.rows(arm, k, seed)) is None:
            continue
        rows, weights = found
        head = fit(features[rows], labels[rows], weights)
        records.append(
            {
                "model": MODEL,
                "basis": basis.name,
                "group": basis.group,
                "arm": arm.name,
                "k": k,
                "seed": seed,
                "train_accuracy": accuracy(head, features[rows], labels[rows]),
                "test_accuracy": accuracy(head, features[n:], labels[n:]),
            }
        )
    return records
