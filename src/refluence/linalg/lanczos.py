"""Krylov subspaces of a symmetric map: Lanczos from several starts, and eigenpairs by a block method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refluence.errors import SolverError
from refluence.linalg.lockstep import Steps, run
from refluence.linalg.maps import Apply
from refluence.linalg.nystroem import normal_columns

GRADE_ROUNDING = 100.0
BLOCK = 8


@dataclass(frozen=True)
class Tridiagonal:
    """C in k Krylov bases: diagonal (k, m), off-diagonal (k, m − 1), how many columns of each basis are of use."""

    diagonal: Float[Tensor, "k m"]
    off_diagonal: Float[Tensor, "k l"]
    grades: Int[Tensor, " k"]
    residuals: Float[Tensor, " k"]
    basis: Float[Tensor, "m k d"]

    def matrices(self) -> Float[Tensor, "k m m"]:
        """The tridiagonal matrices."""
        couplings = torch.diag_embed(self.off_diagonal, offset=1)
        return torch.diag_embed(self.diagonal) + couplings + couplings.mT


def lanczos(apply: Apply, start: Float[Tensor, "d k"], steps: int) -> Tridiagonal:
    """Q_iᵀ C Q_i for an orthonormal basis Q_i of span(v_i, Cv_i, …, C^(m−1)v_i), of every start v_i at once.

    Each step is one product with k columns, orthogonalised twice against all earlier ones, so the bases are orthonormal
    to rounding. A start whose Krylov space is invariant (its grade is reached) goes on with zero columns.

    Args:
        apply: v ↦ Cv, C symmetric.
        start: k starts, none zero.
        steps: m, at most d is used.

    Raises:
        SolverError: a start is zero or a product is not finite.
    """
    return run(lanczos_steps(start, steps), apply)


def lanczos_steps(start: Float[Tensor, "d k"], steps: int) -> Steps[Tridiagonal]:
    """`lanczos` for a map that is applied elsewhere."""
    d, k = start.shape
    m = min(steps, d)
    basis = torch.zeros(m, k, d, dtype=start.dtype, device=start.device)
    diagonal = torch.zeros(k, m, dtype=torch.float64, device=start.device)
    beta = torch.zeros(k, m, dtype=torch.float64, device=start.device)
    grades = torch.full((k,), m, dtype=torch.int64, device=start.device)
    norms = torch.linalg.vector_norm(start, dim=0, dtype=torch.float64)
    if not bool((norms > 0).all()):
        raise SolverError("Lanczos cannot start from a zero or NaN vector")
    basis[0] = (start / norms.to(start.dtype)).T
    largest = torch.zeros(k, dtype=torch.float64, device=start.device)
    rounding = GRADE_ROUNDING * torch.finfo(start.dtype).eps
    for j in range(m):
        image = (yield basis[j].T).T.clone()
        largest = torch.maximum(largest, torch.linalg.vector_norm(image, dim=1, dtype=torch.float64))
        diagonal[:, j] = _orthogonalise(image, basis[: j + 1])[:, j]
        size = torch.linalg.vector_norm(image, dim=1, dtype=torch.float64)
        if not bool(torch.isfinite(size).all()):
            raise SolverError("the curvature's products are not finite: check the model for NaN or Inf")
        ended = size <= rounding * largest
        beta[:, j] = torch.where(ended, 0.0, size)
        grades = torch.where(ended & (grades == m), j + 1, grades)
        if j + 1 < m:
            scale = torch.where(ended, 0.0, 1.0 / torch.where(ended, 1.0, size))
            basis[j + 1] = image * scale.to(image.dtype)[:, None]
            if bool(ended.all()):
                break
    return Tridiagonal(diagonal, beta[:, : m - 1], grades, beta[:, m - 1], basis)


def _orthogonalise(vectors: Float[Tensor, "k d"], basis: Float[Tensor, "m k d"]) -> Float[Tensor, "k m"]:
    """Take the part in each vector's own basis off it, twice and in place; its coefficients in float64."""
    total = torch.zeros(vectors.shape[0], basis.shape[0], dtype=torch.float64, device=vectors.device)
    own = basis.permute(1, 0, 2)
    for _ in range(2):
        coefficients = torch.bmm(own, vectors[:, :, None])
        vectors -= torch.bmm(coefficients.mT, own)[:, 0]
        total += coefficients[:, :, 0]
    return total


@dataclass(frozen=True)
class RitzPairs:
    """Approximate eigenpairs; `residuals` are ‖Cu − su‖ of unit vectors u, so an eigenvalue lies within each of s."""

    values: Float[Tensor, " r"]
    vectors: Float[Tensor, "d r"]
    residuals: Float[Tensor, " r"]
    products: int


def ritz_pairs(
    apply: Apply,
    d: int,
    rank: int,
    seed: int = 0,
    tolerance: float = 1e-6,
    krylov: int | None = None,
    products: int | None = None,
    block: int = BLOCK,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> RitzPairs:
    """The eigenpairs of largest magnitude of a symmetric map, by thick-restarted block Lanczos.

    The basis grows by `block` vectors a product and is orthogonalised twice in full; when it is full, the best Ritz
    vectors are kept (Wu & Simon 2000). What an invariant subspace leaves open is filled with random vectors, so
    rank = d gives all pairs; with fewer, an eigenvalue of higher multiplicity than `block` may be found fewer times
    than it occurs.

    Args:
        apply: v ↦ Cv, C symmetric.
        d: the size of C.
        rank: how many pairs; at most d.
        seed: of the start.
        tolerance: wanted residual, relative to the largest |eigenvalue|; rounding of `dtype` bounds it from below.
        krylov: vectors kept; 2·rank + 2·block by default.
        products: most products Cv; 10·krylov by default.
        block: columns a product.
        dtype: of the basis; matrices of its size are float64.
        device: where the products are made.

    Returns:
        Pairs by falling |eigenvalue|, vectors as the transpose of a contiguous tensor.

    Raises:
        SolverError: a product is not finite.
    """
    return run(ritz_steps(d, rank, seed, tolerance, krylov, products, block, dtype, device), apply)


def ritz_steps(
    d: int,
    rank: int,
    seed: int,
    tolerance: float,
    krylov: int | None,
    products: int | None,
    block: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Steps[RitzPairs]:
    """`ritz_pairs` for a map that is applied elsewhere."""
    rank, block = min(rank, d), min(block, rank, d)
    size = min(d, max(krylov or 0, 2 * (rank + block) if krylov is None else rank + block))
    limit = products or 10 * size
    wanted = max(tolerance, 10 * torch.finfo(dtype).eps)
    space = _Space(d, size, seed, dtype, device)
    space.extend(normal_columns(d, block, seed, dtype, device).T)
    used = 0
    while True:
        remainder = space.project((yield space.newest.T).T)
        used += remainder.shape[0]
        values, vectors, residuals = space.pairs(remainder, rank)
        full = space.filled == d
        done = full or (space.filled >= rank and bool((residuals <= wanted * values.abs().max()).all()))
        if done or (used >= limit and space.filled >= rank):
            return RitzPairs(values, space.combine(vectors).T, residuals, used)
        if space.filled + min(block, d - space.filled) > size:
            space.keep(min(rank + (size - rank) // 2, size - block))
        space.extend(remainder[: size - space.filled])


class _Space:
    """An orthonormal basis with T = QᵀCQ, whose last block's image is not yet in it."""

    def __init__(self, d: int, size: int, seed: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.basis = torch.zeros(size, d, dtype=dtype, device=device)
        self.projected = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.filled = self.before = 0
        self.seed, self.scale = seed, 0.0

    def extend(self, rows: Float[Tensor, "b d"]) -> None:
        """Add an orthonormal basis of the rows; what they leave open is filled at random."""
        self.before = self.filled
        own = self.basis[: self.filled]
        floor = GRADE_ROUNDING * torch.finfo(rows.dtype).eps * self.scale
        for _ in range(4):
            triangle, new = _row_basis(_less(rows, own))
            poor = triangle.diagonal().abs() <= floor
            # A row that was nearly in the space comes out of the first pass with rounding errors along it.
            new = _row_basis(_less(new, own))[1]
            if not bool(poor.any()):
                break
            self.seed += 1
            fresh = normal_columns(rows.shape[1], rows.shape[0], self.seed, rows.dtype, rows.device).T
            rows = torch.where(poor[:, None], fresh, new)
            floor = GRADE_ROUNDING * torch.finfo(rows.dtype).eps
        self.filled += new.shape[0]
        self.basis[self.before : self.filled] = new

    @property
    def newest(self) -> Float[Tensor, "b d"]:
        """The block that was added last."""
        return self.basis[self.before : self.filled]

    def project(self, image: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Fill in T for the newest block; what its image has outside the space."""
        new = slice(self.before, self.filled)
        norm = float(torch.linalg.vector_norm(image, dtype=torch.float64))
        if not norm < float("inf"):
            raise SolverError("the curvature's products are not finite: check the model for NaN or Inf")
        self.scale = max(self.scale, norm)
        own = self.basis[: self.filled]
        coefficients = image @ own.T
        remainder = image - coefficients @ own
        again = remainder @ own.T
        remainder -= again @ own
        total = coefficients.double() + again.double()
        self.projected[new, : self.filled] = total
        self.projected[: self.filled, new] = total.T
        corner = self.projected[new, new]
        self.projected[new, new] = (corner + corner.T) / 2
        return remainder

    def pairs(self, remainder: Float[Tensor, "b d"], count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(values, coordinates as columns, residuals) of the Ritz pairs of largest magnitude."""
        values, vectors = torch.linalg.eigh(self.projected[: self.filled, : self.filled])
        order = values.abs().argsort(descending=True)[:count]
        values, vectors = values[order], vectors[:, order]
        residuals = vectors[self.before :].T.to(remainder.dtype) @ remainder
        return values, vectors, torch.linalg.vector_norm(residuals, dim=1, dtype=torch.float64)

    def combine(self, vectors: Float[Tensor, "m r"]) -> Float[Tensor, "r d"]:
        """Vectors of these coordinates, as rows."""
        return vectors.T.to(self.basis.dtype) @ self.basis[: self.filled]

    def keep(self, count: int) -> None:
        """Restart with the Ritz vectors of largest magnitude."""
        values, vectors = torch.linalg.eigh(self.projected[: self.filled, : self.filled])
        order = values.abs().argsort(descending=True)[:count]
        self.basis[:count] = self.combine(vectors[:, order])
        self.projected.zero_()
        self.projected[:count, :count] = torch.diag(values[order])
        self.filled = count


def _less(rows: Float[Tensor, "b d"], basis: Float[Tensor, "m d"]) -> Float[Tensor, "b d"]:
    return rows - (rows @ basis.T) @ basis


def _row_basis(rows: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b b"], Float[Tensor, "b d"]]:
    """(R, Q) with rows = RᵀQ, Q's rows orthonormal."""
    basis, triangle = torch.linalg.qr(rows.T)
    return triangle, basis.T


@dataclass(frozen=True)
class Ends:
    """Extreme Ritz values: `low` is never below the smallest eigenvalue, `high` never above the largest.

    `low_residual` is that of low's own pair, `margin` the norm of the last residual, at least as large.
    """

    low: float
    high: float
    low_residual: float
    margin: float


def ends_steps(d: int, seed: int, steps: int, dtype: torch.dtype, device: torch.device | str) -> Steps[Ends]:
    """The ends of the spectrum, by Lanczos from one random start."""
    found = yield from lanczos_steps(normal_columns(d, 1, seed, dtype, device), steps)
    grade = int(found.grades[0])
    values, vectors = torch.linalg.eigh(found.matrices()[0, :grade, :grade])
    margin = float(found.residuals[0]) if grade == min(steps, d) else 0.0
    return Ends(float(values[0]), float(values[-1]), margin * abs(float(vectors[-1, 0])), margin)


def spectral_bounds(
    apply: Apply,
    d: int,
    seed: int = 0,
    steps: int = 30,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """(below the smallest, above the largest) eigenvalue: extreme Ritz values less and plus the last residual norm.

    The upper one is the bound of Zhou & Li 2011 (Numer. Linear Algebra Appl. 435, 480), from a random start; both are
    exact to rounding where the Krylov space ends within `steps`.
    """
    ends = run(ends_steps(d, seed, steps, dtype, device), apply)
    return ends.low - ends.margin, ends.high + ends.margin
