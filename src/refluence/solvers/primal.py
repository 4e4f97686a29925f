"""The primal (p×p) side: C = (1/n) Σ w f fᵀ of features f, which are the gradients or their sketches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from refluence.gradients.rows import GradientRows
from refluence.solvers.dual import sum_over
from refluence.solvers.psd import PositiveMatrix
from refluence.solvers.state import Shifts, State, refuse_singular

FeaturesOfBatch = tuple[int, dict[str, Tensor]]


@runtime_checkable
class Features(Protocol):
    """Rows of features by block, in passes."""

    n: int

    def train(self) -> Iterator[FeaturesOfBatch]:
        """(first row, block → features (b, p)) of the train rows."""
        ...

    def tests(self, tests: GradientRows) -> dict[str, Float[Tensor, "k p"]]:
        """Block → features of test rows."""
        ...


class GradientFeatures:
    """The gradients themselves."""

    def __init__(self, rows: GradientRows) -> None:
        self.rows, self.n = rows, rows.n

    def train(self) -> Iterator[FeaturesOfBatch]:
        """(first row, block → gradients)."""
        for start, blocks in self.rows:
            yield start, {name: block.dense() for name, block in blocks.items()}

    def tests(self, tests: GradientRows) -> dict[str, Float[Tensor, "k p"]]:
        """Block → gradients."""
        parts: dict[str, list[Tensor]] = {}
        for _, blocks in tests:
            for name, block in blocks.items():
                parts.setdefault(name, []).append(block.dense())
        return {name: torch.cat(part) for name, part in parts.items()}


class PrimalState(State):
    """One p×p matrix a block."""

    def __init__(
        self,
        features: Features,
        dimensions: Mapping[str, int],
        weights: Float[Tensor, " n"] | None,
        traces: Mapping[str, float] | None = None,
    ) -> None:
        self.features, self.n = features, features.n
        self.dimensions = dict(dimensions)
        self.weights = None if weights is None else weights.double()
        self.systems = {block: PositiveMatrix(matrix) for block, matrix in self._second_moments().items()}
        own = {block: float(torch.trace(system.matrix)) for block, system in self.systems.items()}
        self.traces = dict(traces) if traces is not None else own

    def _second_moments(self) -> dict[str, Float[Tensor, "p p"]]:
        moments: dict[str, Tensor] = {}
        for start, blocks in self.features.train():
            for block, rows in blocks.items():
                values = rows.double()
                weighted = values if self.weights is None else values * self._weight(start, values)
                if block not in moments:
                    p = values.shape[1]
                    moments[block] = torch.zeros(p, p, dtype=torch.float64, device=values.device)
                moments[block].addmm_(weighted.T, values, alpha=1.0 / self.n)
        return moments

    def _weight(self, start: int, rows: Tensor) -> Float[Tensor, "b 1"]:
        assert self.weights is not None
        return self.weights[start : start + rows.shape[0], None].to(rows.device)

    def shift(self, block: str, shift: float) -> float:
        """The μ that is put on the matrix for a wanted one."""
        return shift

    def spectra(self) -> dict[str, tuple[NDArray[np.float64], int | None]]:
        """Block → (eigenvalues of C, None)."""
        return {block: (system.eigenvalues, None) for block, system in self.systems.items()}

    def _systems(self, shifts: Shifts) -> Iterator[tuple[str, PositiveMatrix, float]]:
        for block, system in self.systems.items():
            shift = self.shift(block, shifts[block])
            if shift == 0:
                refuse_singular(system.rank(), system.size, block)
            yield block, system, shift

    def effective_dimension(self, shifts: Shifts) -> float:
        """Σ_b tr C_b(C_b+μ_bI)⁻¹."""
        return sum(system.effective_dimension(shift) for _, system, shift in self._systems(shifts))

    def scores(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[str, Float[Tensor, "k n"]]]:
        """Block → τ(v_i, w_j g_j)."""
        solved = self._solved(tests, shifts)
        values = {
            block: torch.empty(rows.shape[0], self.n, dtype=torch.float64, device=rows.device)
            for block, rows in solved.items()
        }
        for start, blocks in self.features.train():
            for block, rows in blocks.items():
                products = rows.double() @ solved[block].T
                if self.weights is not None:
                    products *= self._weight(start, products)
                values[block][:, start : start + rows.shape[0]] = products.T
        yield from values.items()

    def _train_products(self, shifts: Shifts) -> Iterator[tuple[int, str, Tensor, Tensor]]:
        """(first row, block, features, features (C+μI)⁻¹) over the train rows."""
        systems = {block: (system, shift) for block, system, shift in self._systems(shifts)}
        for start, blocks in self.features.train():
            for block, rows in blocks.items():
                system, shift = systems[block]
                values = rows.double()
                yield start, block, values, system.solve(values.T, shift).T

    def _over_train(self, shifts: Shifts, squared: bool) -> Float[Tensor, " n"]:
        totals: dict[str, Tensor] = {}
        for start, block, values, solved in self._train_products(shifts):
            total = totals.setdefault(block, torch.empty(self.n, dtype=torch.float64, device=values.device))
            part = (solved * (solved if squared else values)).sum(dim=1)
            if self.weights is not None:
                part *= self._weight(start, values)[:, 0] ** (2 if squared else 1)
            total[start : start + values.shape[0]] = part
        return sum_over(iter(totals.values()))

    def self_influence(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """τ(g_j, w_j g_j)."""
        return self._over_train(shifts, squared=False)

    def inverse_norms(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """‖(C+μI)⁻¹ w_j g_j‖²."""
        return self._over_train(shifts, squared=True)

    def inverse_hvp(self, tests: GradientRows, shifts: Shifts) -> dict[str, Float[Tensor, "k p"]]:
        """Block → (C+μI)⁻¹ v_i."""
        return self._solved(tests, shifts)

    def _solved(self, tests: GradientRows, shifts: Shifts) -> dict[str, Float[Tensor, "k p"]]:
        features = self.features.tests(tests)
        return {
            block: system.solve(features[block].double().T, shift).T for block, system, shift in self._systems(shifts)
        }
