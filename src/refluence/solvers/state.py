"""What a solver makes of a curvature: a state that applies (C + μI)⁻¹ in the forms that scores need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from refluence.errors import PlanError
from refluence.gradients.rows import GradientRows

Shifts = dict[str, float]


class State(ABC):
    """A prepared solver; `shifts` gives each block's μ = l2 + λ.

    The train side of every product is w_j g_j, the gradient of example j's term in the weighted objective.
    """

    n: int
    traces: dict[str, float]
    dimensions: dict[str, int]
    exact: bool = True

    @abstractmethod
    def spectra(self) -> dict[str, tuple[NDArray[np.float64], int | None]]:
        """Block → (eigenvalues, sketch size where they are those of a sketch to be corrected for)."""

    @abstractmethod
    def effective_dimension(self, shifts: Shifts) -> float:
        """Σ_b tr C_b(C_b+μ_bI)⁻¹."""

    @abstractmethod
    def scores(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[str, Float[Tensor, "k n"]]]:
        """Block → τ(v_i, w_j g_j); the blocks sum to the scores."""

    @abstractmethod
    def self_influence(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """τ(g_j, w_j g_j), summed over blocks."""

    @abstractmethod
    def inverse_norms(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """‖(C+μI)⁻¹ w_j g_j‖² over all blocks."""

    @abstractmethod
    def inverse_hvp(self, tests: GradientRows, shifts: Shifts) -> dict[str, Float[Tensor, "k d"]]:
        """Block → (C+μI)⁻¹ v_i."""


def refuse_singular(rank: int, size: int, block: str) -> None:
    """At λ = 0, an error unless the curvature has full rank."""
    if rank < size:
        raise PlanError(
            f"the curvature of block {block!r} is singular (rank {rank} of {size}), so it has no inverse at damping 0: "
            "use a damping > 0"
        )


def root_weights(weights: Tensor | None) -> Float[Tensor, " n"] | None:
    """√w in float64, None for equal weights."""
    return None if weights is None else weights.double().sqrt()


def scale_rows(matrix: Float[Tensor, "n k"], scale: Tensor | None) -> Float[Tensor, "n k"]:
    """diag(scale) @ matrix, in place."""
    return matrix if scale is None else matrix.mul_(scale.to(matrix.device)[:, None])


def trace_of(matrix: Tensor) -> float:
    """The trace as a number."""
    return float(torch.trace(matrix))
