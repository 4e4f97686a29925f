"""The exact side: spectrum, coordinates of the gradients in it, exact scores and what errors are measured against.

Notation: n train gradients G, k test gradients V, F = GᵀG/n with eigenvalues σ and eigenvectors in the r directions
that float64 resolves. K = GGᵀ/n = QΣQᵀ has the same σ, and in F's eigenvectors g_i = √n Σ^{1/2}Q_i, v = c + what lies
outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.errors import DataError
from refluence.theory import effective_dimension, numerical_rank

RANK_CUT = 1e-10


@dataclass(frozen=True, eq=False)
class Spectral:
    """Train and test gradients in the eigenvectors of F.

    Args:
        eigenvalues: of F, all n that the Gram matrix has, descending, none negative.
        basis: Q, (n, r): the eigenvectors of GGᵀ/n of the first r eigenvalues.
        tests: c, (k, r): the test gradients in F's eigenvectors.
        outside: (k, q): the rest of the test gradients, in some orthonormal basis.
        rank_cut: eigenvalues above rank_cut·σ_max count for τ_0.
    """

    eigenvalues: Float64[Tensor, " n"]
    basis: Float64[Tensor, "n r"]
    tests: Float64[Tensor, "k r"]
    outside: Float64[Tensor, "k q"]
    rank_cut: float = RANK_CUT

    @staticmethod
    def of_gram(gram: Float64[Tensor, "N N"], n: int, rank_cut: float = RANK_CUT) -> Spectral:
        """From the inner products of the n train gradients and the tests after them.

        Raises:
            DataError: all train gradients are zero.
        """
        values, vectors = torch.linalg.eigh(gram[:n, :n] / n)
        values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
        if not float(values[0]) > 0:
            raise DataError("all train gradients are zero: there is nothing to attribute with this model")
        rank = numerical_rank(values)
        basis = vectors[:, :rank].contiguous()
        tests = (gram[n:, :n] @ basis) / (n * values[:rank]).sqrt()
        rest, directions = torch.linalg.eigh(gram[n:, n:] - tests @ tests.T)
        # what is below the rounding of the subtraction is no direction
        kept = rest > torch.finfo(torch.float64).eps * len(gram) * gram[n:, n:].diagonal().max()
        return Spectral(values, basis, tests, directions[:, kept] * rest[kept].sqrt(), rank_cut)

    def tensors(self) -> dict[str, Tensor]:
        """What `restored` takes."""
        return {name: getattr(self, name) for name in ("eigenvalues", "basis", "tests", "outside")}

    @staticmethod
    def restored(
        tensors: Mapping[str, Tensor], rank_cut: float = RANK_CUT, device: torch.device | str = "cpu"
    ) -> Spectral:
        """What `tensors` gave."""
        return Spectral(**{name: tensor.to(device) for name, tensor in tensors.items()}, rank_cut=rank_cut)

    def of_train(self, count: int) -> Spectral:
        """The first train gradients in the place of the tests."""
        tests = self.n**0.5 * self.basis[:count] * self.roots
        return replace(self, tests=tests, outside=tests.new_zeros(len(tests), 0))

    def with_tests(self, rows: Tensor) -> Spectral:
        """Some of the tests only."""
        return replace(self, tests=self.tests[rows], outside=self.outside[rows])

    @property
    def n(self) -> int:
        """Train gradients."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """r, the directions that float64 resolves."""
        return self.basis.shape[1]

    @property
    def cut(self) -> int:
        """The eigenvalues that count for τ_0."""
        return int((self.eigenvalues > self.rank_cut * self.eigenvalues[0]).sum().clamp(max=self.rank))

    @cached_property
    def roots(self) -> Float64[Tensor, " r"]:
        """√σ of the r directions."""
        return self.eigenvalues[: self.rank].sqrt()

    def dimension(self, damping: float) -> float:
        """d_λ = Σ σ/(σ+λ)."""
        return effective_dimension(self.eigenvalues, damping)

    def scores(self, damping: float) -> Float64[Tensor, "n k"]:
        """Exact τ_λ(g_i, v_j), in the push-through form, in which nothing cancels."""
        values = self.eigenvalues[: self.rank]
        return self.n**0.5 * self.basis @ (self.tests * (self.roots / (values + damping))).T

    def tau_0(self) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " k"]]:
        """τ_0(g, g) = gᵀF†g of train and test gradients, over the eigenvalues above the cut."""
        return self._whitened_squares(torch.ones(self.cut, dtype=torch.float64, device=self.basis.device))

    def gap(self, damping: float) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " k"]]:
        """τ_0 − τ_λ = λ uᵀ(F+λ)⁻¹u with u = F^{†1/2}g, of train and test gradients, over the same eigenvalues."""
        return self._whitened_squares(damping / (self.eigenvalues[: self.cut] + damping))

    def _whitened_squares(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        train = self.n * self.basis[:, : self.cut].square() @ weights
        tests = (self.tests[:, : self.cut] / self.roots[: self.cut]).square() @ weights
        return train, tests

    def test_norms(self) -> Float64[Tensor, " k"]:
        """‖v‖ of each test gradient."""
        return (self.tests.square().sum(dim=1) + self.kernel_norms().square()).sqrt()

    def kernel_norms(self) -> Float64[Tensor, " k"]:
        """‖v_⊥‖, what of each test gradient no train gradient has."""
        return self.outside.norm(dim=1)
