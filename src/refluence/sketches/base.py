"""What every sketch is: a seeded linear map to m numbers; one of columns is applied to chunks of them in any order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.errors import RefluenceError
from refluence.gradients.blocks import GradientBlock, accumulation_dtype
from refluence.gradients.matrices import LayerMatrix

S = TypeVar("S", bound="Sketch")

LIFTED_COLUMNS = 2048


class Sketch(ABC):
    """A random P (m×d) with E[PᵀP] = I, the same for a seed however the work is split.

    d is taken from what the sketch is given.
    """

    m: int
    seed: int

    def __post_init__(self) -> None:
        for name, low in (("m", 1), ("seed", 0)):
            object.__setattr__(self, name, checked_integer(name, getattr(self, name), low))

    def reseeded(self: S, seed: int) -> S:
        """The same sketch with another seed."""
        return replace(self, seed=seed)  # type: ignore[type-var]

    def on(self: S, layers: Sequence[LayerMatrix]) -> S:
        """The sketch of gradients of these layers, as `lift` and `project` of plain rows may need to know them."""
        return self

    @abstractmethod
    def add(self, out: Float[Tensor, "n m"], block: GradientBlock) -> None:
        """Add G Pᵀ of a gradient block to `out`."""

    def project(self, gradients: Float[Tensor, "n d"] | GradientBlock) -> Float[Tensor, "n m"]:
        """G Pᵀ of dense rows or of a gradient block, whose d-long gradients are never formed all at once.

        Raises:
            RefluenceError: not a floating-point matrix.
        """
        if isinstance(gradients, GradientBlock):
            return gradients.sketch(self)
        if not isinstance(gradients, Tensor) or gradients.ndim != 2 or not gradients.is_floating_point():
            got = (
                f"{gradients.dtype} of shape {tuple(gradients.shape)}"
                if isinstance(gradients, Tensor)
                else type(gradients).__name__
            )
            raise RefluenceError(f"a sketch projects rows (n, d) of floating-point numbers, not {got}")
        dtype = accumulation_dtype(gradients.dtype)
        out = torch.zeros(gradients.shape[0], self.m, dtype=dtype, device=gradients.device)
        self._add_plain_rows(out, gradients.to(dtype))
        return out

    @abstractmethod
    def lift(self, values: Float[Tensor, "m k"], d: int) -> Float[Tensor, "d k"]:
        """Pᵀ Y: back to d numbers."""

    @abstractmethod
    def work(self, d: int, kept: float) -> float:
        """Multiply-adds, about, of projecting a gradient of length d of which `kept` numbers are kept."""

    @abstractmethod
    def _add_plain_rows(self, out: Float[Tensor, "n m"], rows: Float[Tensor, "n d"]) -> None: ...

    def matrix(self, d: int, dtype: torch.dtype = torch.float64) -> Float[Tensor, "m d"]:
        """P itself, for small d."""
        return self.project(torch.eye(d, dtype=dtype)).T


class ColumnSketch(Sketch):
    """A sketch of columns: column j of P depends on the seed and on j alone."""

    chunk_rows: int
    chunk_columns: int

    @abstractmethod
    def accumulate(self, out: Float[Tensor, "n m"], columns: Float[Tensor, "n c"], start: int) -> None:
        """Add `columns` P[:, start : start + c]ᵀ to `out`."""

    def add(self, out: Float[Tensor, "n m"], block: GradientBlock) -> None:
        """Add G Pᵀ of a gradient block to `out`, some columns at a time."""
        block.add_sketch(out, self, 0)

    def lift(self, values: Float[Tensor, "m k"], d: int) -> Float[Tensor, "d k"]:
        """Pᵀ Y: back to d numbers, some columns of P at a time."""
        out = torch.empty(values.shape[1], d, dtype=values.dtype, device=values.device).T
        for start in range(0, d, LIFTED_COLUMNS):
            count = min(LIFTED_COLUMNS, d - start)
            columns = torch.zeros(count, self.m, dtype=values.dtype, device=values.device)
            self.accumulate(columns, torch.eye(count, dtype=values.dtype, device=values.device), start)
            out[start : start + count] = columns @ values
        return out

    def _add_plain_rows(self, out: Float[Tensor, "n m"], rows: Float[Tensor, "n d"]) -> None:
        for start in range(0, rows.shape[1], self.chunk_columns):
            self.accumulate(out, rows[:, start : start + self.chunk_columns], start)


def checked_integer(name: str, value: object, low: int) -> int:
    """The value as an integer of at least `low` that fits 63 bits.

    Raises:
        RefluenceError: another value.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= int(value) < 1 << 63:
        raise RefluenceError(f"{name} of a sketch must be an integer of at least {low}, not {value!r}")
    return int(value)
