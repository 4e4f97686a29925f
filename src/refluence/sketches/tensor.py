"""Tensor sketches: CountSketches of both factors of a layer's gradients, convolved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from refluence.gradients.blocks import CHUNK_ELEMENTS
from refluence.gradients.factors import Factor, OneHot, Term
from refluence.gradients.matrices import LayerMatrix
from refluence.sketches.factored import FactoredSketch
from refluence.sketches.random_bits import non_negative, random_bits

STREAMS = 1 << 40
"""First stream of random bits, so that an SJLT of the same seed has others."""


@dataclass(frozen=True)
class TensorSketch(FactoredSketch):
    """A CountSketch of each layer's gradient Σ_t e_t ⊗ ã_t whose row at (r, c) is h_E(r) + h_A(c) mod m.

    The sign is s_E(r)·s_A(c). By the convolution theorem it is Σ_t IFFT(FFT(C_E e_t) ∘ FFT(C_A ã_t)) with the
    CountSketches C_E and C_A of the factors (Pham & Pagh 2013): O(R + C + m log m) an example and position, never
    forming the gradient. ã is a with 1 appended where the layer has a bias. Pairs (r, c) ≠ (r', c') differ in r or in
    c, and so have signs of mean product zero: E[P_lᵀP_l] = I. A parameter whose gradient is no outer product is a
    matrix of one column, on which this is a plain CountSketch; over several layers the sketches are added
    (`FactoredSketch`).

    Args:
        m: sketch size; powers of two have the fastest Fourier transforms.
        seed: which P.
    """

    m: int
    seed: int = 0

    def work(self, d: int, kept: float) -> float:
        """Additions to hashed places and three real Fourier transforms, for the usual several layers of a block."""
        return 4.0 * kept + 10.0 * self.m * math.log2(2 * self.m)

    def add_outer(self, parts: Sequence[tuple[Float[Tensor, "n m"], tuple[Term, ...]]], bias: bool, at: int) -> None:
        """Add the convolved CountSketches of the factors of each part to its output."""
        fed: dict[int, Tensor] = {}
        for out, terms in parts:
            for term in terms:
                step = max(1, CHUNK_ELEMENTS // (term.row.t * (term.row.k + term.column.k + 4 * self.m)))
                for first in range(0, term.row.n, step):
                    last = min(first + step, term.row.n)
                    whole = last - first == term.row.n
                    columns = fed.get(id(term.column)) if whole else None
                    if columns is None:
                        columns = self._transformed(term.column.rows(first, last), at, 1, bias, out.dtype)
                    if whole:
                        fed[id(term.column)] = columns
                    rows = self._transformed(term.row.rows(first, last), at, 0, False, out.dtype)
                    out[first:last] += torch.fft.irfft((rows * columns).sum(dim=1), n=self.m)

    def _transformed(self, factor: Factor, at: int, side: int, one: bool, dtype: torch.dtype) -> Tensor:
        """The Fourier transform of the CountSketch of every vector, with 1 appended where asked for: (n, t, m/2+1)."""
        device = factor.tensors()[0].device
        places, signs = self._hashed(at, side, factor.k + one, device)
        sums = torch.zeros(factor.n * factor.t, self.m, dtype=dtype, device=device)
        if isinstance(factor, OneHot):
            index = factor.index.reshape(-1, 1)
            sums.scatter_(1, places[index], signs[index].to(dtype))
        else:
            values = factor.vectors().reshape(-1, factor.k).to(dtype) * signs[: factor.k].to(dtype)
            sums.index_add_(1, places[: factor.k], values)
        if one:
            sums[:, places[-1]] += signs[-1].to(dtype)
        return torch.fft.rfft(sums).unflatten(0, (factor.n, factor.t))

    def _add_matrices(
        self, out: Float[Tensor, "n m"], weights: Float[Tensor, "n R C"], bias: Float[Tensor, "n R"] | None, at: int
    ) -> None:
        _, R, C = weights.shape
        places, signs = self._pairs(at, R, C + (bias is not None), out.device)
        out.index_add_(1, places[:, :C].flatten(), (weights * signs[:, :C].to(out.dtype)).flatten(1))
        if bias is not None:
            out.index_add_(1, places[:, C], bias * signs[:, C].to(out.dtype))

    def _lifted(self, values: Float[Tensor, "k m"], layer: LayerMatrix) -> Float[Tensor, "k R W"]:
        places, signs = self._pairs(layer.at, layer.rows, layer.width, values.device)
        return values[:, places] * signs.to(values.dtype)

    def _pairs(self, at: int, rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and sign of every entry of the matrix."""
        (left, minus), (right, other) = self._hashed(at, 0, rows, device), self._hashed(at, 1, width, device)
        return (left[:, None] + right) % self.m, minus[:, None] * other

    def _hashed(
        self, at: int, side: int, count: int, device: torch.device
    ) -> tuple[Int64[Tensor, " c"], Int64[Tensor, " c"]]:
        """Row and sign of every entry of a factor."""
        bits = random_bits(self.seed, STREAMS + 2 * at + side, 0, count, device)
        return non_negative(bits) % self.m, 1 - 2 * (bits < 0).to(torch.int64)
