"""What every curvature is: a symmetric block-diagonal matrix C, the mean over examples, known by its products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from refluence.errors import PlanError, RefluenceError
from refluence.gradients.parts import Parts, Pass, Tree
from refluence.gradients.rows import GradientRows
from refluence.linalg import Apply
from refluence.theory import SpectralMeasure

Vectors = dict[str, Tensor]
"""Block → (d, k): k vectors over the parameters of each block."""

IDENTITY_COLUMNS = 256


class Curvature(ABC):
    """C = (1/n) Σ_i w_i C_i of the training examples, one matrix for each block of parameters, without l2 or damping.

    Args:
        name: "fisher", "ggn", "hessian", "true_fisher" or "mc_fisher".
        rows: the per-example gradients of the training loss, the train side of every score.
        weights: w_i of each example in the training objective; None: all 1.
        positive: whether C ⪰ 0 by construction.

    Attributes:
        parts: the same curvature in stretches of the rows that lie elsewhere; None: it is made here. The C of a part is
            its share of the mean over all examples, so that the parts' add up.
        held: what passes keep here from one to the next, by name.
    """

    def __init__(self, name: str, rows: GradientRows, weights: Float[Tensor, " n"] | None, positive: bool) -> None:
        self.name, self.rows, self.positive = name, rows, positive
        self.weights = weights
        self.parts: Parts | None = None
        self.held: dict[str, Any] = {}
        self.known_spectra: dict[str, SpectralMeasure] | None = None

    @property
    def n(self) -> int:
        """The number of examples that C is the mean over."""
        return self.rows.batches.whole

    @property
    def groups(self) -> tuple[str, ...]:
        """The blocks."""
        return self.rows.groups

    @property
    def dimensions(self) -> dict[str, int]:
        """Block → d."""
        return {group: self.rows.dimension(group) for group in self.groups}

    @property
    def device(self) -> torch.device:
        """Where the products are made."""
        return self.rows.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the gradients."""
        return self.rows.dtype

    def lie_in(self, parts: Parts) -> None:
        """Let every pass over the data be made in these parts."""
        self.parts = self.rows.parts = parts
        self.rows.role = "rows"

    def total(self, function: Pass, *given: Any) -> Tree:
        """The sum of a pass over the data (`Parts`), wherever they are."""
        return function(self, *given) if self.parts is None else self.parts.total("", function, *given)

    def by_row(self, function: Pass, *given: Any) -> Tree:
        """What a pass gives for each example (`Parts`), wherever they are."""
        return function(self, *given) if self.parts is None else self.parts.by_row("", function, *given)

    @abstractmethod
    def matvec(self, vectors: Vectors) -> Vectors:
        """Block → C_b V_b, for the blocks given and in the dtype of the vectors, in one pass over the data."""

    def sampled(self, rows: Int64[Tensor, " b"], vectors: Vectors) -> Vectors:
        """Block → (1/b) Σ_{i ∈ rows} w_i C_i V over some training examples; its mean over random rows is C V.

        Raises:
            PlanError: a curvature that is not known by its examples, or gradients that are not kept in memory.
        """
        raise PlanError(f'curvature "{self.name}" cannot be had for a batch of examples: use batch_size=None')

    def sampled_each(self, rows: Int64[Tensor, "g b"], vectors: Vectors) -> Vectors:
        """`sampled` for g sets of b examples, each on its own share of the columns, in their order."""
        parts = {block: v.chunk(rows.shape[0], dim=1) for block, v in vectors.items()}
        each = [self.sampled(chosen, {b: part[i] for b, part in parts.items()}) for i, chosen in enumerate(rows)]
        return {block: torch.cat([products[block].T for products in each]).T for block in vectors}

    def operator(self, block: str) -> Apply:
        """v ↦ C_b v."""
        return partial(self._product, block)

    def _product(self, block: str, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        return self.matvec({block: vectors})[block]

    def linear_operator(self, block: str | None = None, shift: float = 0.0) -> LinearOperator:
        """C_b + shift·I for `scipy.sparse.linalg`, in float64; `block` may be left out where there is only one.

        Raises:
            RefluenceError: an unknown block, or none given where there are several.
        """
        if block is None and len(self.groups) == 1:
            [block] = self.groups
        if block not in self.groups:
            raise RefluenceError(f"there is no block {block!r} for a linear operator: give one of {list(self.groups)}")
        d, apply = self.dimensions[block], self.operator(block)

        def product(vectors):  # type: ignore[no-untyped-def]
            columns = torch.as_tensor(vectors, dtype=torch.float64, device=self.device).reshape(d, -1)
            return (apply(columns) + shift * columns).cpu().numpy().reshape(vectors.shape)

        return LinearOperator((d, d), matvec=product, rmatvec=product, matmat=product, dtype="float64")

    def dense(self) -> dict[str, Float[Tensor, "d d"]]:
        """Block → C_b in float64, symmetric to the last bit."""
        return {block: self._dense(block) for block in self.groups}

    def _dense(self, block: str) -> Float[Tensor, "d d"]:
        d, apply = self.dimensions[block], self.operator(block)
        matrix = torch.empty(d, d, dtype=torch.float64, device=self.device)
        for first in range(0, d, IDENTITY_COLUMNS):
            last = min(first + IDENTITY_COLUMNS, d)
            unit = torch.zeros(last - first, d, dtype=torch.float64, device=self.device).T
            unit[range(first, last), range(last - first)] = 1.0
            matrix[:, first:last] = apply(unit)
        return (matrix + matrix.T) / 2

    def diagonal(self) -> dict[str, Float[Tensor, " d"]]:
        """Block → the diagonal of C_b, in float64."""
        return {block: self._dense(block).diagonal() for block in self.groups}

    def spectra(self) -> dict[str, SpectralMeasure]:
        """Block → the spectrum: exact where d or the number of rows is small, else by stochastic Lanczos quadrature."""
        if self.known_spectra is None:
            from refluence.curvature.spectrum import spectrum_of

            self.known_spectra = {block: spectrum_of(self, block) for block in self.groups}
        return self.known_spectra

    def traces(self) -> dict[str, float]:
        """Block → tr C_b."""
        return {block: measure.trace for block, measure in self.spectra().items()}
