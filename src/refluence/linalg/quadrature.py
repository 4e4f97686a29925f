"""Stochastic Lanczos quadrature: traces of functions of a symmetric map."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.linalg.lanczos import Tridiagonal, lanczos
from refluence.linalg.maps import Apply


def spectral_quadrature(
    apply: Apply,
    d: int,
    probes: int = 10,
    steps: int = 50,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[Float[Tensor, "k m"], Float[Tensor, "k m"]]:
    """(nodes, weights) with Σ weights·f(nodes) ≈ tr f(C), for any f.

    Row i, times k, is the m-point Gauss rule of zᵢᵀ f(C) zᵢ for a random sign vector zᵢ, of which tr f(C) is the mean:
    exact for polynomials of degree 2m − 1, and for every f once m reaches the grade of zᵢ. The k rows are independent,
    so their spread is the standard error. Weights that belong to nothing are 0 and their nodes lie in the spectrum.
    Ubaru, Chen & Saad 2017 (SIAM J. Matrix Anal. Appl. 38, 1075).

    Args:
        apply: v ↦ Cv, C symmetric.
        d: the size of C.
        probes: k.
        steps: m; each is one product with k columns.
        seed: of the sign vectors, which depend on nothing else but d and k.
        dtype: of the products.
        device: where they are made.
    """
    nodes, weights = gauss_rules(lanczos(apply, sign_columns(d, probes, seed, dtype, device), steps))
    return nodes, weights * (d / probes)


def gauss_rules(found: Tridiagonal) -> tuple[Float[Tensor, "k m"], Float[Tensor, "k m"]]:
    """(nodes, weights) with Σ_j weights_ij f(nodes_ij) = v_iᵀ f(C) v_i/‖v_i‖² where the Krylov space has ended."""
    matrices, m = found.matrices(), found.diagonal.shape[1]
    if bool((found.grades == m).all()):
        nodes, vectors = torch.linalg.eigh(matrices)
        return nodes, vectors[:, 0].square()
    nodes, weights = torch.empty_like(found.diagonal), torch.zeros_like(found.diagonal)
    for i, grade in enumerate(found.grades.tolist()):
        values, vectors = torch.linalg.eigh(matrices[i, :grade, :grade])
        # An f that is singular at 0 must not meet the zeros of the columns beyond the grade.
        nodes[i] = values[-1]
        nodes[i, :grade], weights[i, :grade] = values, vectors[0].square()
    return nodes, weights


def sign_columns(
    d: int, columns: int, seed: int, dtype: torch.dtype, device: torch.device | str
) -> Float[Tensor, "d k"]:
    """Columns of random signs, a function of the seed and the shape."""
    generator = torch.Generator("cpu").manual_seed(seed)
    signs = torch.randint(2, (columns, d), generator=generator, dtype=torch.int8) * 2 - 1
    return signs.to(device, dtype).T
