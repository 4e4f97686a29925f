"""Kronecker sketches: both factors of a layer's gradients are projected."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.errors import PlanError
from refluence.gradients.blocks import CHUNK_ELEMENTS
from refluence.gradients.factors import Factor, Term
from refluence.gradients.matrices import LayerMatrix
from refluence.sketches.base import checked_integer
from refluence.sketches.factored import FactoredSketch
from refluence.sketches.random_bits import mix

CACHE_BYTES = 256 << 20

S = TypeVar("S", bound="Kronecker")

_factors: OrderedDict[tuple, Tensor] = OrderedDict()
_kept_bytes = 0
_lock = threading.Lock()


@dataclass(frozen=True)
class Kronecker(FactoredSketch):
    """P_l = P_E ⊗ P_A for each layer l, of m = m_a·m_e rows: Σ_t e_t ⊗ ã_t becomes Σ_t (P_E e_t) ⊗ (P_A ã_t).

    ã is a with 1 appended where the layer has a bias. P_E (m_e×R) and P_A (m_a×C̃) are independent, of mean zero, with
    E[P_EᵀP_E] = I and E[P_AᵀP_A] = I, so E[P_lᵀP_l] = E[P_EᵀP_E] ⊗ E[P_AᵀP_A] = I; over several layers the sketches are
    added (`FactoredSketch`). R·m_e + C̃·m_a + m multiply-adds an example and position, never forming the gradient. e has
    the rows of the weight matrix, which of an embedding are the tokens, and ã its columns.

    A factor's rows are random orthogonal directions, scaled to √(R/m_e) or √(C̃/m_a), and the factor is an isometry
    where it has no fewer rows than columns: nothing is lost there, where Gaussian entries would still distort. What
    bounds the errors are the factors, not their product m (arXiv 2602.10449, Thm 6).

    The projection of both factors is that of LoGra (Choe et al., "What is Your Data Worth to GPT?", 2024, section 3.2).

    Args:
        m_a: rows of P_A.
        m_e: rows of P_E.
        seed: which P.
        orthogonal: False: factors with entries N(0, 1/m_e) and N(0, 1/m_a), to which published bounds apply as such.
    """

    m_a: int
    m_e: int
    seed: int = 0
    orthogonal: bool = True
    m: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("m_a", "m_e"):
            object.__setattr__(self, name, checked_integer(name, getattr(self, name), 1))
        object.__setattr__(self, "m", self.m_a * self.m_e)
        super().__post_init__()

    def on(self: S, layers: Sequence[LayerMatrix]) -> S:
        """The sketch of gradients of these layers, which also projects plain rows and lifts.

        Raises:
            PlanError: parameters whose gradients are no outer products.
        """
        if others := [name for layer in layers if not layer.outer for name in layer.names]:
            raise PlanError(
                f"a Kronecker sketch projects both factors of outer products, and the gradients of {', '.join(others)} "
                "are none (scales, shifts and biases without their weight): leave them out with "
                "Task(parameters=...), or use a TensorSketch or an SJLT, which take every parameter"
            )
        return super().on(layers)

    def work(self, d: int, kept: float) -> float:
        """The rows of the factors for each number kept, and the outer products."""
        return kept * max(self.m_a, self.m_e) + self.m

    def add_outer(self, parts: Sequence[tuple[Float[Tensor, "n m"], tuple[Term, ...]]], bias: bool, at: int) -> None:
        """Add Σ_t (P_E e_t) ⊗ (P_A ã_t) of each part to its output."""
        fed: dict[int, Tensor] = {}
        for out, terms in parts:
            for term in terms:
                P_E, P_A = self.factors(at, term.row.k, term.column.k + bias, out)
                step = max(1, CHUNK_ELEMENTS // (term.row.t * (term.row.k + term.column.k + self.m_a + self.m_e)))
                if term.row.n <= step:
                    if id(term.column) not in fed:
                        fed[id(term.column)] = self._fed(term.column, P_A, bias)
                    self._add_products(out, term.row.products(P_E.T), fed[id(term.column)])
                    continue
                for first in range(0, term.row.n, step):
                    last = min(first + step, term.row.n)
                    columns = self._fed(term.column.rows(first, last), P_A, bias)
                    self._add_products(out[first:last], term.row.rows(first, last).products(P_E.T), columns)

    def factors(
        self, at: int, rows: int, width: int, like: Tensor
    ) -> tuple[Float[Tensor, "e R"], Float[Tensor, "a W"]]:
        """(P_E, P_A) of the layer at this first column, in the dtype and on the device of `like`.

        Args:
            at: the layer's first column in its block.
            rows: R.
            width: C, with one more for a bias.
        """
        return self._factor(at, 0, self.m_e, rows, like), self._factor(at, 1, self.m_a, width, like)

    def _fed(self, factor: Factor, P_A: Float[Tensor, "a W"], bias: bool) -> Float[Tensor, "n t a"]:
        """P_A ã."""
        return factor.products(P_A[:, : factor.k].T) + (P_A[:, factor.k] if bias else 0)

    def _add_products(self, out: Tensor, rows: Float[Tensor, "n t e"], columns: Float[Tensor, "n t a"]) -> None:
        sums = out.unflatten(1, (self.m_e, self.m_a))
        if rows.shape[1] == 1:
            sums.addcmul_(rows[:, 0, :, None], columns[:, 0, None, :])
        else:
            sums += torch.bmm(rows.transpose(1, 2), columns)

    def _add_matrices(
        self, out: Float[Tensor, "n m"], weights: Float[Tensor, "n R C"], bias: Float[Tensor, "n R"] | None, at: int
    ) -> None:
        R, C = weights.shape[1:]
        P_E, P_A = self.factors(at, R, C + (bias is not None), out)
        sums = out.unflatten(1, (self.m_e, self.m_a))
        if R * self.m_a * (C + self.m_e) <= C * self.m_e * (R + self.m_a):
            columns = weights @ P_A[:, :C].T
            if bias is not None:
                columns = columns + bias[:, :, None] * P_A[:, C]
            sums += P_E @ columns
        else:
            sums += (P_E @ weights) @ P_A[:, :C].T
            if bias is not None:
                sums += (bias @ P_E.T)[:, :, None] * P_A[:, C]

    def _lifted(self, values: Float[Tensor, "k m"], layer: LayerMatrix) -> Float[Tensor, "k R W"]:
        P_E, P_A = self.factors(layer.at, layer.rows, layer.width, values)
        return P_E.T @ values.unflatten(1, (self.m_e, self.m_a)) @ P_A

    def _factor(self, at: int, side: int, rows: int, columns: int, like: Tensor) -> Float[Tensor, "r c"]:
        """P_E (side 0) or P_A (side 1) of the layer at a column, in the dtype and on the device of `like`."""
        key = (self.seed, self.orthogonal, at, side, rows, columns, like.dtype, str(like.device))
        if (kept := _factors.get(key)) is None:
            # Drawn on the CPU whatever the device, so that P is the same on all.
            seed = mix(mix(mix(torch.tensor(self.seed, dtype=torch.int64))) + 2 * at + side)
            generator = torch.Generator().manual_seed(int(seed) & ((1 << 63) - 1))
            normal = torch.randn(columns, rows, generator=generator, dtype=torch.float64).T
            kept = (_orthogonal(normal) if self.orthogonal else normal * rows**-0.5).to(like)
            _keep(key, kept)
        return kept


def _orthogonal(normal: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
    """√(c/r) times orthonormal rows or, of a tall matrix, orthonormal columns, of a random and fair choice."""
    rows, columns = normal.shape
    Q, R = torch.linalg.qr(normal if rows > columns else normal.T)
    # The signs that LAPACK leaves open are fixed, without which Q is not of mean zero (Mezzadri 2007).
    Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return Q if rows > columns else Q.T * (columns / rows) ** 0.5


def _keep(key: tuple, factor: Tensor) -> None:
    """Keep a factor for the next batch, the oldest making room."""
    global _kept_bytes
    with _lock:
        if key not in _factors:
            _factors[key] = factor
            _kept_bytes += factor.nbytes
        while len(_factors) > 1 and _kept_bytes > CACHE_BYTES:
            _, oldest = _factors.popitem(last=False)
            _kept_bytes -= oldest.nbytes
