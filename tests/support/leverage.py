"""Matrices with a known spectrum, and dense float64 references that use none of the library."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def with_spectrum(n: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """n rows with the given singular values."""
    generator = torch.Generator().manual_seed(seed)
    d = len(sigma)
    U = torch.linalg.qr(torch.randn(n, d, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    return (U * sigma) @ V.T


def deficient(n: int = 200, seed: int = 0) -> Tensor:
    """Rank 8 in 12 columns: a zero one first, a copy, a sum of two others, a multiple."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 12, generator=generator, dtype=torch.float64)
    X[:, 0] = 0
    X[:, 5] = X[:, 2]
    X[:, 7] = X[:, 1] + X[:, 3]
    X[:, 9] = -3 * X[:, 4]
    return X


def plain(X: Tensor, rtol: float = 1e-11) -> Tensor:
    """diag X X⁺ by the singular value decomposition of NumPy."""
    U, sigma, _ = np.linalg.svd(X.double().numpy(), full_matrices=False)
    return torch.from_numpy((U[:, sigma > rtol * sigma[0]] ** 2).sum(axis=1))


def ridge(X: Tensor, damping: float) -> Tensor:
    """diag X (XᵀX + nλI)⁻¹ Xᵀ."""
    X = X.double()
    return (X * torch.linalg.solve(X.T @ X + len(X) * damping * torch.eye(X.shape[1]).double(), X.T).T).sum(dim=1)
