"""Symmetric linear maps as functions of a matrix of columns."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

Apply = Callable[[Float[Tensor, "d k"]], Float[Tensor, "d k"]]
"""V ↦ A V for a symmetric A, in the dtype of V, all columns together."""
