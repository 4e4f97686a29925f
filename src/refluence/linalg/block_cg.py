"""Breakdown-free block conjugate gradients: all columns search one space together."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from refluence.linalg.columns import (
    NEGATIVE,
    ColumnSolution,
    OnStep,
    Recurrence,
    System,
    advance,
    iterate,
    refuse_negative,
    rows_kept,
    slopes_along,
)
from refluence.linalg.maps import Apply

LINGERING = 0.1
"""Columns that leave take their directions with them, and the last ones would be left to converge almost alone."""

CHUNK = 16384
"""Entries of a row that are widened to float64 at a time."""


def block_conjugate_gradient(
    apply: Apply,
    right: Float[Tensor, "d k"],
    rtol: float,
    atol: float,
    maxiter: int,
    precondition: Apply | None = None,
    on_step: OnStep | None = None,
    measured: bool = True,
) -> ColumnSolution:
    """A⁻¹B as `conjugate_gradient`, minimising each column's error over the directions of all of them.

    With P an orthonormal basis of the search space: α = (PᵀAP)⁻¹PᵀR, X += Pα, R −= APα, and the next space is that of
    Z − P(PᵀAP)⁻¹(AP)ᵀZ with Z the preconditioned residuals. Its rank is decided from the Gram matrix of the
    normalised directions, so that dependent, duplicate and more columns than rows do no harm. k×k algebra is in
    float64; a step costs eight products of k×k with k×d, beside the product with A.

    Source: Ji & Li, A breakdown-free block conjugate gradient method, BIT 57 (2017), algorithm 2.
    """
    system = System(right, rtol, atol, measured)
    iterate(apply, system, BlockRecurrence(system.value, precondition), maxiter, on_step)
    return system.solution()


class BlockRecurrence(Recurrence):
    """Directions that are orthonormal and A-conjugate to those before."""

    lingering = LINGERING

    def __init__(self, value: Float[Tensor, "k d"], precondition: Apply | None) -> None:
        self.precondition = precondition
        self.columns: Int64[Tensor, " a"] = torch.zeros(0, dtype=torch.int64, device=value.device)
        self.directions = self.residual = self._products = value[:0]
        self._inverse = torch.zeros(0, 0, dtype=torch.float64, device=value.device)
        self._largest = 0.0

    def step(self, products: Float[Tensor, "j d"], value: Float[Tensor, "k d"]) -> Bool[Tensor, " a"]:
        """The minimum over the space; stuck are the columns whose residual has a part where there is no curvature."""
        self._products = products
        if not products.shape[0]:
            return torch.ones(self.columns.shape, dtype=torch.bool, device=value.device)
        self._inverse, flat = self._inverted(gram(self.directions, products))
        along = gram(self.directions, self.residual)
        lengths = (self._inverse @ along).T.to(value.dtype)
        rounding = torch.finfo(value.dtype).eps * self._largest
        drowned = advance(value, self.columns, lengths @ self.directions, rounding)
        self.residual = torch.addmm(self.residual, lengths, products, alpha=-1)
        # A part along a direction without curvature is in the residual for good.
        lost = torch.linalg.vector_norm(flat.T @ along, dim=0)
        return drowned | (lost > 0.5 * torch.linalg.vector_norm(self.residual, dim=1, dtype=torch.float64))

    def _inverted(self, matrix: Float64[Tensor, "j j"]) -> tuple[Float64[Tensor, "j j"], Float64[Tensor, "j f"]]:
        """(inverse of PᵀAP where it has curvature, basis of where it has none)."""
        matrix = (matrix + matrix.T) / 2
        self._largest = max(self._largest, float(matrix.diagonal().abs().max()))
        rounding = torch.finfo(self.directions.dtype).eps * self._largest
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            inverse = torch.cholesky_inverse(factor)
            # tr(S⁻¹) ≥ 1/λ_min
            if float(inverse.trace()) * rounding < 1:
                return inverse, matrix[:, :0]
        values, vectors = torch.linalg.eigh(matrix)
        if float(values[0]) < -NEGATIVE * rounding:
            direction = vectors[:, 0].to(self.directions.dtype) @ self.directions
            refuse_negative(float(values[0]) / float(direction.double().square().sum()))
        curved = values > rounding
        return (vectors[:, curved] / values[curved]) @ vectors[:, curved].T, vectors[:, ~curved]

    def select(self, keep: Bool[Tensor, " a"], joining: Int64[Tensor, " c"], residual: Float[Tensor, "c d"]) -> None:
        """The next space."""
        self.columns = rows_kept(self.columns, keep, joining)
        self.residual = rows_kept(self.residual, keep, residual)
        if not self.columns.numel():
            self.directions = self.residual
            return
        towards = self.residual
        if self.precondition is not None:
            towards = self.precondition(self.residual.T).T
            slopes_along(self.residual, towards)
        if self._products.shape[0]:
            conjugate = (self._inverse @ gram(self._products, towards)).T.to(towards.dtype)
            towards = torch.addmm(towards, conjugate, self.directions, alpha=-1)
        directions = orthonormal(towards)
        if self._products.shape[0] and directions.dtype != torch.float64:
            # What normalising has made of the rounding of small directions is not conjugate.
            again = (self._inverse @ gram(self._products, directions)).T.to(towards.dtype)
            directions = torch.addmm(directions, again, self.directions, alpha=-1)
        self.directions = directions


def orthonormal(rows: Float[Tensor, "k d"]) -> Float[Tensor, "j d"]:
    """An orthonormal basis of the rows' space, j its numerical rank: singular values down to 64ε of the rows' dtype.

    From the Gram matrix of the rows at length one. It shows singular values down to the square root of float64's
    rounding; what lies below is taken again, freed of the directions found and scaled up, until nothing above 64ε is
    left: directions this small carry much of an ill-conditioned system's solution.
    """
    k = rows.shape[0]
    smallest = 64 * torch.finfo(rows.dtype).eps
    cut = max(smallest**2, 16 * k * torch.finfo(torch.float64).eps)
    matrix = gram(rows, rows)
    lengths = matrix.diagonal().sqrt()
    scale = torch.where(lengths > 0, 1 / lengths, 0.0)
    matrix = matrix * scale * scale[:, None]
    if (inverse := triangular_inverse(matrix)) is not None and float(inverse.square().sum()) * cut < 1:
        return (inverse * scale).to(rows.dtype) @ rows  # ‖L⁻¹‖² ≥ 1/λ_min
    rows = rows * scale[:, None].to(rows.dtype)
    basis, size = rows[:0], 1.0
    while True:
        values, vectors = torch.linalg.eigh(matrix)
        kept = values > cut * float(values[-1])
        found = (vectors[:, kept] / values[kept].sqrt()).T.to(rows.dtype) @ rows
        inverse = triangular_inverse(gram(found, found))
        basis = torch.cat([basis, found if inverse is None else inverse.to(rows.dtype) @ found])
        rows = vectors[:, ~kept].T.to(rows.dtype) @ rows
        for _ in range(2):
            rows = rows - gram(rows, basis).to(rows.dtype) @ basis
        largest = float(torch.linalg.matrix_norm(rows, ord="fro"))
        size *= largest
        if size <= smallest:
            return basis
        rows = rows / largest
        matrix = gram(rows, rows)


def triangular_inverse(matrix: Float64[Tensor, "j j"]) -> Float64[Tensor, "j j"] | None:
    """L⁻¹ of the Cholesky factor; None where the matrix is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    return torch.linalg.solve_triangular(factor, torch.eye(len(matrix)).to(matrix), upper=False)


def gram(left: Float[Tensor, "j d"], right: Float[Tensor, "k d"]) -> Float64[Tensor, "j k"]:
    """Inner products of rows in float64."""
    if left.dtype == torch.float64:
        return left @ right.T
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.float64, device=left.device)
    for start in range(0, left.shape[1], CHUNK):
        here = slice(start, start + CHUNK)
        total.addmm_(left[:, here].double(), right[:, here].double().T)
    return total
