"""Gaussian sketches drawn in the eigenvectors of F: the same law as projected gradients, at a cost without d.

P X for orthonormal X is Gaussian whatever X is, so with the coordinates of `Spectral` only Z = √m P X (m × (r + q)) is
drawn. Where m < r the rows of Z are nested: a prefix is the smaller sketch. Beyond, only W = ZᵀZ matters, which grows
by independent Wishart increments, drawn in Bartlett's form where they have r degrees of freedom or more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from scipy.linalg import lapack
from torch import Tensor

from refluence.studies.projection.spectral import Spectral
from refluence.studies.projection.system import SketchedSystem

BLOCK_ROWS = 256
_ROWS, _INCREMENT = 0, 1


@dataclass(frozen=True, eq=False)
class GramGaussian:
    """Gaussian sketches of the gradients of a `Spectral`, without the gradients."""

    spectral: Spectral

    def systems(self, seed: int, sizes: Sequence[int], wanted: set[int]) -> Iterator[SketchedSystem]:
        """The systems of the wanted sizes, ascending.

        Sizes of r and more depend on which sizes of r and more come before them, and on the last one below.
        """
        rank = self.spectral.rank
        low, high = [m for m in sizes if m < rank], [m for m in sizes if m >= rank]
        rows = self._rows(seed, max(low)) if low and (wanted & set(low) or wanted & set(high)) else None
        if rows is not None and wanted & set(low):
            yield from self._small(rows, [m for m in low if m in wanted])
        if wanted & set(high):
            yield from self._large(seed, rows, high, wanted)

    def _rows(self, seed: int, count: int) -> Float64[Tensor, "m p"]:
        """The first rows of Z, made block by block, so that more rows have the same first ones."""
        width = self.spectral.rank + self.spectral.outside.shape[1]
        blocks = [
            np.random.default_rng([seed, _ROWS, block]).standard_normal((BLOCK_ROWS, width))
            for block in range(-(-count // BLOCK_ROWS))
        ]
        return torch.from_numpy(np.concatenate(blocks)[:count]).to(self.spectral.basis.device)

    def _projected_tests(self, rows: Float64[Tensor, "m p"]) -> Float64[Tensor, "m k"]:
        inside, beyond = rows[:, : self.spectral.rank], rows[:, self.spectral.rank :]
        return inside @ self.spectral.tests.T + beyond @ self.spectral.outside.T

    def _small(self, rows: Float64[Tensor, "M p"], sizes: Sequence[int]) -> Iterator[SketchedSystem]:
        """m×m systems: every smaller one is the corner of the largest."""
        scaled = rows[:, : self.spectral.rank] * self.spectral.roots
        curvature = scaled @ scaled.T
        left = self.spectral.n**0.5 * self.spectral.basis @ scaled.T
        right = self._projected_tests(rows)
        for m in sizes:
            yield SketchedSystem(m, curvature[:m, :m] / m, left[:, :m] / m**0.5, right[:m] / m**0.5)

    def _large(
        self, seed: int, rows: Float64[Tensor, "M p"] | None, sizes: Sequence[int], wanted: set[int]
    ) -> Iterator[SketchedSystem]:
        """r×r systems: M = Σ^{1/2}W₁₁Σ^{1/2}/m, R = Σ^{1/2}(W₁₁cᵀ + W₁₂·outsideᵀ)/m."""
        spectral, rank = self.spectral, self.spectral.rank
        before = 0 if rows is None else len(rows)
        inner = torch.zeros(rank, rank, dtype=torch.float64, device=spectral.basis.device)
        across = torch.zeros(rank, len(spectral.tests), dtype=torch.float64, device=inner.device)
        if rows is not None:
            inner.addmm_(rows[:, :rank].T, rows[:, :rank])
            across.addmm_(rows[:, :rank].T, rows[:, rank:] @ spectral.outside.T)
        for m in (m for m in sizes if m <= max(wanted)):
            self._add_increment(inner, across, np.random.default_rng([seed, _INCREMENT, before, m]), m - before)
            before = m
            if m in wanted:
                right = spectral.roots[:, None] * (inner @ spectral.tests.T + across) / m
                curvature = spectral.roots[:, None] * inner * (spectral.roots / m)
                left = spectral.n**0.5 * spectral.basis
                yield SketchedSystem(m, curvature, left, right, dual=True)

    def _add_increment(
        self,
        inner: Float64[Tensor, "r r"],
        across: Float64[Tensor, "r k"],
        generator: np.random.Generator,
        freedom: int,
    ) -> None:
        """Add Z₁ᵀZ₁ and Z₁ᵀZ₂·outsideᵀ of `freedom` further rows [Z₁ Z₂] of Z."""
        outside, rank = self.spectral.outside, self.spectral.rank
        if freedom < rank:
            rows = torch.from_numpy(generator.standard_normal((freedom, rank + outside.shape[1]))).to(inner.device)
            inner.addmm_(rows[:, :rank].T, rows[:, :rank])
            across.addmm_(rows[:, :rank].T, rows[:, rank:] @ outside.T)
            return
        factor = bartlett_factor(generator, rank, freedom)
        beyond = torch.from_numpy(generator.standard_normal((rank, outside.shape[1]))).to(inner.device)
        inner += upper_gram(factor).to(inner.device)
        # Z₁ = OUᵀ with orthonormal O, so Z₁ᵀZ₂ = U(OᵀZ₂), and OᵀZ₂ is Gaussian whatever O is
        across += torch.from_numpy(factor).to(inner.device) @ (beyond @ outside.T)


def bartlett_factor(generator: np.random.Generator, size: int, freedom: int) -> np.ndarray:
    """Upper triangular U with UUᵀ ~ Wishart(I, freedom): normal above the diagonal, U_ii² ~ χ²(freedom − size + 1 + i).

    Source: Bartlett 1933, in reversed order of the coordinates.
    """
    factor = np.zeros((size, size), order="F")
    for column in range(1, size):
        factor[:column, column] = generator.standard_normal(column)
    np.fill_diagonal(factor, np.sqrt(generator.chisquare(freedom - size + 1.0 + np.arange(size))))
    return factor


def upper_gram(factor: np.ndarray) -> Float64[Tensor, "r r"]:
    """UUᵀ of an upper triangular U, by a third of the work of a full product."""
    product, info = lapack.dlauum(factor, lower=0)
    assert info == 0
    upper = torch.from_numpy(np.ascontiguousarray(product)).triu()
    return upper + upper.triu(1).T
