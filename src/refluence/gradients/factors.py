"""Factors of outer-product gradients: for every example and position a vector, kept in its cheapest form.

Axis letters: n examples, t positions, k length of the factor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class Factor(ABC):
    """Vectors (n, t, k)."""

    n: int
    t: int
    k: int

    @abstractmethod
    def vectors(self) -> Float[Tensor, "n t k"]:
        """The vectors themselves."""

    @abstractmethod
    def products(self, matrix: Float[Tensor, "k m"]) -> Float[Tensor, "n t m"]:
        """vectorᵀ M for each vector, in the dtype of M."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Factor:
        """The factor of examples [start, stop)."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What is kept in memory."""


@dataclass(frozen=True, eq=False)
class Dense(Factor):
    """Vectors kept as they are."""

    values: Float[Tensor, "n t k"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", self.values.shape[0])
        object.__setattr__(self, "t", self.values.shape[1])
        object.__setattr__(self, "k", self.values.shape[2])

    def vectors(self) -> Float[Tensor, "n t k"]:
        """The vectors themselves."""
        return self.values

    def products(self, matrix: Float[Tensor, "k m"]) -> Float[Tensor, "n t m"]:
        """vectorᵀ M for each vector."""
        return self.values.to(matrix.dtype) @ matrix

    def rows(self, start: int, stop: int) -> Dense:
        """The factor of examples [start, stop)."""
        return Dense(self.values[start:stop])

    def tensors(self) -> tuple[Tensor, ...]:
        """What is kept in memory."""
        return (self.values,)


@dataclass(frozen=True, eq=False)
class OneHot(Factor):
    """Unit vectors, kept as the index of their one; `dtype` is that of the vectors when they are formed."""

    index: Int[Tensor, "n t"]
    size: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", self.index.shape[0])
        object.__setattr__(self, "t", self.index.shape[1])
        object.__setattr__(self, "k", self.size)

    def vectors(self) -> Float[Tensor, "n t k"]:
        """The vectors themselves."""
        return F.one_hot(self.index, self.size).to(self.dtype)

    def products(self, matrix: Float[Tensor, "k m"]) -> Float[Tensor, "n t m"]:
        """The rows of M that the ones select."""
        return matrix[self.index]

    def rows(self, start: int, stop: int) -> OneHot:
        """The factor of examples [start, stop)."""
        return OneHot(self.index[start:stop], self.size, self.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """What is kept in memory."""
        return (self.index,)


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, eq=False)
class Patches(Factor):
    """Patches of a convolution's input, kept as the input (kernel-size times smaller).

    `padding` is as in `torch.nn.functional.pad`; `kernel`, `stride`, `dilation` have one entry a spatial dimension.
    """

    images: Float[Tensor, "n g c *space"]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]

    def __post_init__(self) -> None:
        space = self.images.shape[3:]
        t = self.images.shape[1]
        for i, size in enumerate(space):
            before, after = self.padding[2 * (len(space) - 1 - i) :][:2]
            t *= (size + before + after - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
        object.__setattr__(self, "n", self.images.shape[0])
        object.__setattr__(self, "t", t)
        object.__setattr__(self, "k", self.images.shape[2] * torch.Size(self.kernel).numel())

    def vectors(self) -> Float[Tensor, "n t k"]:
        """The vectors themselves: each position's patch, channels first, as in the flattened weight."""
        patches = F.pad(self.images, self.padding)
        dims = len(self.kernel)
        for i in range(dims):
            window = self.dilation[i] * (self.kernel[i] - 1) + 1
            patches = patches.unfold(3 + i, window, self.stride[i])[..., :: self.dilation[i]]
        # n, g, c, positions..., kernel...  ->  n, g, positions..., c, kernel...
        order = [0, 1, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
        return patches.permute(order).reshape(self.n, self.t, self.k)

    def products(self, matrix: Float[Tensor, "k m"]) -> Float[Tensor, "n t m"]:
        """vectorᵀ M for each patch, as the convolution whose kernels are the columns of M; no patch is formed."""
        if (convolve := _CONVOLUTIONS.get(len(self.kernel))) is None:
            return self.vectors().to(matrix.dtype) @ matrix
        images = F.pad(self.images.to(matrix.dtype), self.padding).flatten(0, 1)
        kernels = matrix.T.reshape(-1, images.shape[1], *self.kernel)
        found = convolve(images, kernels, stride=self.stride, dilation=self.dilation)
        return found.flatten(2).unflatten(0, (self.n, -1)).transpose(2, 3).reshape(self.n, self.t, -1)

    def rows(self, start: int, stop: int) -> Patches:
        """The factor of examples [start, stop)."""
        return Patches(self.images[start:stop], self.kernel, self.stride, self.dilation, self.padding)

    def tensors(self) -> tuple[Tensor, ...]:
        """What is kept in memory."""
        return (self.images,)


@dataclass(frozen=True, eq=False)
class Term:
    """One use of a weight matrix: Σ_t row_t ⊗ column_t."""

    row: Factor
    column: Factor


def inner(first: Factor, second: Factor, dtype: torch.dtype) -> Float[Tensor, "n t m s"]:
    """Inner products ⟨first[n, t], second[m, s]⟩ without forming one-hot vectors."""
    shape = (first.n, first.t, second.n, second.t)
    if isinstance(first, OneHot) and isinstance(second, OneHot):
        return (first.index.reshape(-1, 1) == second.index.reshape(1, -1)).to(dtype).reshape(shape)
    if isinstance(first, OneHot):
        values = second.vectors().reshape(-1, second.k).to(dtype)
        return values[:, first.index.reshape(-1)].T.reshape(shape)
    if isinstance(second, OneHot):
        values = first.vectors().reshape(-1, first.k).to(dtype)
        return values[:, second.index.reshape(-1)].reshape(shape)
    left = first.vectors().reshape(-1, first.k).to(dtype)
    right = second.vectors().reshape(-1, second.k).to(dtype)
    return (left @ right.T).reshape(shape)
