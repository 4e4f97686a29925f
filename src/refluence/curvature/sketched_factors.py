"""Kronecker factors of a layer under a sketch of their own: (P_E E P_Eᵀ) ⊗ (P_A A P_Aᵀ), never forming E or A."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from refluence.curvature.kronecker import KroneckerBlock
from refluence.gradients.factors import Dense, Factor, Term
from refluence.gradients.outer import OuterBlock


@dataclass(frozen=True, eq=False)
class FactorSketch:
    """P_E and P_A of one layer.

    Args:
        rows: P_E.
        columns: P_A, its last column that of the bias where there is one.
        bias: whether there is.
    """

    rows: Float[Tensor, "e R"]
    columns: Float[Tensor, "a C"]
    bias: bool

    def project(self, parts: Sequence[OuterBlock]) -> tuple[OuterBlock, ...]:
        """Σ_t (P_E e_t) ⊗ (P_A ã_t) of each part, as factors; what parts share, their projections share too."""
        kept: dict[int, Dense] = {}

        def projected(factor: Factor, P: Tensor, bias: bool) -> Dense:
            if id(factor) not in kept:
                products = factor.products(P[:, : factor.k].T.contiguous())
                kept[id(factor)] = Dense(products + P[:, factor.k] if bias else products)
            return kept[id(factor)]

        return tuple(
            OuterBlock(
                tuple(
                    Term(projected(term.row, self.rows, False), projected(term.column, self.columns, self.bias))
                    for term in part.terms
                )
            )
            for part in parts
        )

    def lift(self, basis: KroneckerBlock) -> KroneckerBlock:
        """The basis P_EᵀQ_E ⊗ P_AᵀQ_A, in which gradients are those of `basis` after their projection."""
        assert basis.rows is not None
        assert basis.columns is not None
        rows, columns = (P.T.to(Q) @ Q for P, Q in ((self.rows, basis.rows), (self.columns, basis.columns)))
        return replace(basis, rows=rows, columns=columns, bias=self.bias)
