"""The randomised Nyström approximation of a positive semi-definite map."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.errors import SolverError
from refluence.linalg.lockstep import Steps, run
from refluence.linalg.maps import Apply

ROW_CHUNK = 1 << 14
SHIFTS = 8


def nystroem_approximation(
    apply: Apply,
    d: int,
    rank: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[Float[Tensor, "d r"], Float[Tensor, " r"]]:
    """U diag(s) Uᵀ = CΩ (ΩᵀCΩ)⁺ (CΩ)ᵀ ≈ C for a random orthonormal Ω (d, r), from one product with r columns.

    It lies below C in the order of positive matrices, and equals C where the rank of C is at most r. The shift
    ν ≈ √d·ε·‖CΩ‖ that makes the Cholesky factor exist is taken off again, so eigenvalues below it come out as 0.
    Frangella, Tropp & Udell 2023 (arXiv 2110.02820), Alg. 2.1.

    Args:
        apply: v ↦ Cv, C ⪰ 0.
        d: the size of C.
        rank: r; at most d is used.
        seed: of Ω, which depends on nothing else but d and r.
        dtype: of the product and of U; matrices of size r are float64 throughout.
        device: where the product is made.

    Returns:
        (U with orthonormal columns kept as the transpose of a contiguous tensor, s in float64 descending, ≥ 0).

    Raises:
        SolverError: C is not positive semi-definite, or its products are not finite.
    """
    return run(nystroem_steps(d, rank, seed, dtype, device), apply)


def nystroem_steps(
    d: int, rank: int, seed: int, dtype: torch.dtype, device: torch.device | str
) -> Steps[tuple[Float[Tensor, "d r"], Float[Tensor, " r"]]]:
    """`nystroem_approximation` for a map that is applied elsewhere."""
    test = random_orthonormal(d, min(rank, d), seed, dtype, device)
    image = yield test
    norm = float(torch.linalg.vector_norm(image, dtype=torch.float64))
    if norm == 0:
        return test, torch.zeros(test.shape[1], dtype=torch.float64, device=image.device)
    if not norm < float("inf"):
        raise SolverError("the curvature's products are not finite: check the model for NaN or Inf")
    core = inner_products(test, image)
    core = (core + core.T) / 2
    shift, factor = _shifted_cholesky(core, norm * d**0.5 * torch.finfo(dtype).eps)
    image = image + shift * test
    # In the orientation of LAPACK, (L⁻¹ Yᵀ)ᵀ; Y is never held in float64.
    half = torch.linalg.solve_triangular(factor.to(dtype), image.T, upper=False).T
    basis, triangle = torch.linalg.qr(half)
    left, roots, _ = torch.linalg.svd(triangle.double())
    vectors = (left.T.to(dtype) @ basis.T).T
    return vectors, (roots.square() - shift).clamp_(min=0.0)


def random_orthonormal(
    d: int, columns: int, seed: int, dtype: torch.dtype, device: torch.device | str
) -> Float[Tensor, "d k"]:
    """An orthonormal basis of the span of standard normal columns, the same for each dtype and device."""
    draws = normal_columns(d, columns, seed, dtype, device)
    basis: Tensor = torch.linalg.qr(draws).Q
    return basis.T.contiguous().T


def normal_columns(
    d: int, columns: int, seed: int, dtype: torch.dtype, device: torch.device | str
) -> Float[Tensor, "d k"]:
    """Standard normal columns, a function of the seed and the shape."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(columns, d, generator=generator, dtype=torch.float32).to(device, dtype).T


def inner_products(left: Float[Tensor, "d k"], right: Float[Tensor, "d l"]) -> Float[Tensor, "k l"]:
    """LᵀR in float64, some rows at a time."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    for first in range(0, left.shape[0], ROW_CHUNK):
        rows = slice(first, first + ROW_CHUNK)
        total.addmm_(left[rows].double().T, right[rows].double())
    return total


def _shifted_cholesky(core: Float[Tensor, "r r"], shift: float) -> tuple[float, Float[Tensor, "r r"]]:
    """(ν, L) with LLᵀ = core + νI for the first ν that is large enough for rounding in the products."""
    identity = torch.eye(core.shape[0], dtype=core.dtype, device=core.device)
    for power in range(SHIFTS):
        factor, info = torch.linalg.cholesky_ex(core + shift * 4**power * identity)
        if int(info) == 0:
            return shift * 4**power, factor
    lowest = float(torch.linalg.eigvalsh(core)[0])
    raise SolverError(
        f"the Nyström approximation needs a curvature ⪰ 0, but a Rayleigh–Ritz value is {lowest:.3g}: use a Fisher "
        "or GGN curvature, or solver Arnoldi"
    )
