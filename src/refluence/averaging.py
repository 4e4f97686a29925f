"""Means over models, and how far they are from those of many models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor


@dataclass
class Spread:
    """Running moments over models of x, and of the product of means x̄·q̄ where there are q (Welford 1962)."""

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    q_mean: Tensor | float = 0.0
    q_squares: Tensor | float = 0.0
    products: Tensor | float = 0.0
    weighted: bool = False

    def add(self, x: Float64[Tensor, "k n"], q: Float64[Tensor, " n"] | None) -> None:
        """One more model."""
        self.count += 1
        before = x - self.mean
        self.mean = self.mean + before / self.count
        self.squares = self.squares + before * (x - self.mean)
        if q is not None:
            self.weighted = True
            q_before = q - self.q_mean
            self.q_mean = self.q_mean + q_before / self.count
            self.q_squares = self.q_squares + q_before * (q - self.q_mean)
            self.products = self.products + before * (q - self.q_mean)

    @property
    def value(self) -> Float64[Tensor, "k n"]:
        """x̄, or x̄·q̄."""
        return torch.as_tensor(self.mean * self.q_mean if self.weighted else self.mean)

    @property
    def variance(self) -> Float64[Tensor, "k n"] | None:
        """Of `value`, of first order in the spread of x and q; None for a single model."""
        if self.count < 2:
            return None
        total = torch.as_tensor(self.squares)
        if self.weighted:
            q, x = torch.as_tensor(self.q_mean), torch.as_tensor(self.mean)
            total = q**2 * self.squares + x**2 * self.q_squares + 2 * q * x * self.products
        return (total / (self.count * (self.count - 1))).clamp(min=0)

    @property
    def slope(self) -> Tensor | float:
        """∂value/∂x̄."""
        return self.q_mean if self.weighted else 1.0


@dataclass
class Errors:
    """The variance of the mean that the models' own errors make."""

    count: int = 0
    squares: Tensor | None = None

    def add(self, error: Float64[Tensor, "k n"] | None) -> None:
        """One more model; None is no error."""
        self.count += 1
        if error is not None:
            self.squares = error.square() if self.squares is None else self.squares + error.square()

    @property
    def variance(self) -> Float64[Tensor, "k n"] | None:
        """Σ e_c² / c²."""
        return None if self.squares is None else self.squares / self.count**2


def standard_error(spread: Spread, errors: Errors, scale: int) -> Float64[Tensor, "k n"] | None:
    """√(variance of the spread over models and of their own errors), times `scale`; None where neither is known."""
    own = None if errors.variance is None else errors.variance * torch.as_tensor(spread.slope) ** 2
    parts = [part for part in (spread.variance, own) if part is not None]
    return scale * torch.stack(parts).sum(dim=0).sqrt() if parts else None
