"""What every solver offers."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from refluence.curvature import Curvature
from refluence.solvers.cost import Cost, Workload
from refluence.solvers.state import State


@runtime_checkable
class Solver(Protocol):
    """A way of applying (C + μI)⁻¹: a frozen configuration.

    One that can only work on the rows of a curvature, and not on its products, says so by `needs_rows = True`.
    """

    def prepare(self, curvature: Curvature) -> State:
        """What scores need, made from a curvature."""
        ...

    def restore(self, curvature: Curvature, tensors: dict[str, Tensor]) -> State:
        """The same from what the state exported, without the work of `prepare`."""
        ...

    def cost(self, w: Workload) -> Cost:
        """Memory and arithmetic of `prepare` and one score call."""
        ...
