"""Scores of one sketch with their standard errors, at every damping."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.solvers.sketch_errors import standard_errors
from refluence.studies.projection.system import SketchedSystem


@dataclass(frozen=True, eq=False)
class SketchedScores:
    """A sketch of m rows by the eigenvectors of PCPᵀ, which serve every damping.

    Args:
        values: the eigenvalues, none negative.
        train, tests: PG and PV in the eigenvectors.
    """

    values: Float64[Tensor, " m"]
    train: Float64[Tensor, "n m"]
    tests: Float64[Tensor, "k m"]

    @staticmethod
    def of(system: SketchedSystem) -> SketchedScores:
        """Of a system that stands for PCPᵀ, and so has the sketched rows."""
        assert not system.dual, "a dual system has no sketched rows"
        assert system.left is not None
        values, vectors = torch.linalg.eigh(system.curvature)
        return SketchedScores(values.clamp(min=0.0), system.left @ vectors, system.right.T @ vectors)

    def at(self, mu: float, scale: float) -> tuple[Float64[Tensor, "k n"], Float64[Tensor, "k n"]]:
        """(τ̃ with μ, its standard errors with κ²/(mκ') = `scale`), see `standard_errors`."""
        left, right = self.tests / (self.values + mu), self.train / (self.values + mu)
        scores = left @ self.train.T
        return scores, standard_errors(left @ right.T, left.square().sum(dim=1), right.square().sum(dim=1), scale)
