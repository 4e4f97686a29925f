"""What a solver's work is made of: sizes that decide its memory and its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from refluence.damping import DampingChoice

EIGENVALUES_WORK = 8.0
"""Time of LAPACK's symmetric eigenvalues over that of n³/3 multiply-adds of a Cholesky factorisation, measured."""


@dataclass(frozen=True)
class Workload:
    """What the work is: sizes, and what a probe of the gradients measured.

    Args:
        n, tests: train and test examples.
        dimensions: block → d.
        q: rows of the curvature for each example; None where it is known by products only.
        bytes_per_row: memory of one example's gradient as it is kept.
        feature_bytes_per_row: memory of one example's q rows of the curvature, 0 where they are its gradient.
        inner_product_work: multiply-adds of the inner product of two gradients.
        gradient_seconds: measured time of one example's gradient.
        product_work: multiply-adds of one product of the curvature with one vector.
        itemsize, batch_size, device: of the gradients.
        damping: what is asked for; a rule needs the spectrum.
        offload: where rows are held, as in `rf.Execution`.
        keeps: whether solvers that take whole train gradients hold them as rows, as `rf.Execution` asks.
    """

    n: int
    tests: int
    dimensions: dict[str, int]
    q: int | None
    bytes_per_row: float
    feature_bytes_per_row: float
    inner_product_work: float
    gradient_seconds: float
    product_work: float
    itemsize: int
    batch_size: int
    device: torch.device
    damping: DampingChoice
    offload: str = "none"
    keeps: bool = False

    @property
    def d(self) -> int:
        """All attributed parameters."""
        return sum(self.dimensions.values())

    @property
    def held_elsewhere(self) -> bool:
        """Whether rows take none of the device's memory."""
        return self.offload == "disk" or (self.offload == "cpu" and self.device.type != "cpu")

    @property
    def whole_row_bytes(self) -> float:
        """Memory of one example's gradient as a row of d numbers."""
        return float(self.d * max(4, self.itemsize))

    @property
    def score_bytes(self) -> float:
        """Memory of the scores, twice."""
        return 16.0 * self.n * self.tests

    @property
    def spectral(self) -> float:
        """Work of a factorisation of one matrix, over a Cholesky's: a damping by rule needs the eigenvalues."""
        return 1.0 if isinstance(self.damping, float) else 1.0 + EIGENVALUES_WORK

    @property
    def test_bytes(self) -> float:
        """Memory of dense test gradients and what is solved of them, in float64."""
        return 16.0 * self.d * min(self.tests, 512)

    @property
    def dot_work(self) -> float:
        """Multiply-adds of the inner products of solved test vectors with every train gradient."""
        return float(self.n) * self.d * self.tests


@dataclass(frozen=True)
class Cost:
    """What a solver takes: bytes that it must have, bytes of gradients that it would like kept, and multiply-adds.

    Args:
        fixed: bytes.
        kept: bytes of gradients that further passes then need not make.
        work: multiply-adds.
        passes: passes over the gradients where they are not kept.
        tiled: whether what cannot be kept is met in stretches, each with every other: passes grow with their number.
        why_not: why the solver cannot do it at all, None where it can.
    """

    fixed: float
    kept: float
    work: float
    passes: float = 1.0
    tiled: bool = False
    why_not: str | None = None

    @classmethod
    def impossible(cls, why_not: str) -> Cost:
        """A solver that cannot do it."""
        return cls(float("inf"), 0.0, float("inf"), why_not=why_not)
