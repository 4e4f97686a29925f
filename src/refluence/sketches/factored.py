"""Sketches of sums of outer products: each layer has a P of its own, applied to the factors of its gradients."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.errors import RefluenceError
from refluence.gradients.blocks import GradientBlock
from refluence.gradients.factors import Term
from refluence.gradients.joint import gather, scatter
from refluence.gradients.matrices import LayerMatrix
from refluence.sketches.base import Sketch

S = TypeVar("S", bound="FactoredSketch")


class FactoredSketch(Sketch):
    """PG = Σ_l P_l G_l over the layers l of a block, with independent P_l of mean zero and E[P_lᵀP_l] = I.

    The sum is unbiased as well: with P = [P_1 … P_L], E[P_lᵀP_k] = E[P_l]ᵀE[P_k] = 0 for l ≠ k, so E[PᵀP] = I. A layer
    is known by its first column in the block, so that P is the same whether its gradients come as factors or as rows.
    """

    layers: tuple[LayerMatrix, ...] | None = None

    def on(self: S, layers: Sequence[LayerMatrix]) -> S:
        """The sketch of gradients of these layers, which also projects plain rows and lifts.

        Raises:
            PlanError: layers that this kind of sketch cannot take.
        """
        found = copy.copy(self)
        # The layers are no part of the configuration: two sketches are equal, and recorded, without them.
        object.__setattr__(found, "layers", tuple(layers))
        return found

    def add(self, out: Float[Tensor, "n m"], block: GradientBlock) -> None:
        """Add G Pᵀ of a gradient block to `out`, layer by layer."""
        block.add_factored(out, self, 0)

    @abstractmethod
    def add_outer(self, parts: Sequence[tuple[Float[Tensor, "n m"], tuple[Term, ...]]], bias: bool, at: int) -> None:
        """Add the projected outer products of each part to its output; what parts share is projected once."""

    @abstractmethod
    def _add_matrices(
        self, out: Float[Tensor, "n m"], weights: Float[Tensor, "n R C"], bias: Float[Tensor, "n R"] | None, at: int
    ) -> None:
        """Add the projections of gradients that are formed to `out`."""

    @abstractmethod
    def _lifted(self, values: Float[Tensor, "k m"], layer: LayerMatrix) -> Float[Tensor, "k R W"]:
        """P_lᵀ of k vectors as matrices, the bias as their last column."""

    def add_rows(self, out: Float[Tensor, "n m"], rows: Float[Tensor, "n e"], at: int) -> None:
        """Add the projections of a layer's gradients, kept as rows, to `out`."""
        [layer] = [layer for layer in self._known() if layer.at == at]
        weight = layer.rows * layer.columns
        matrices = rows[:, :weight].unflatten(1, (layer.rows, layer.columns))
        self._add_matrices(out, matrices, rows[:, weight:] if layer.bias else None, at)

    def _add_plain_rows(self, out: Float[Tensor, "n m"], rows: Float[Tensor, "n d"]) -> None:
        for layer in self._known():
            self.add_rows(out, gather(rows.T, layer.stretches).T, layer.at)

    def lift(self, values: Float[Tensor, "m k"], d: int) -> Float[Tensor, "d k"]:
        """Pᵀ Y: back to d numbers, layer by layer."""
        out = torch.empty(values.shape[1], d, dtype=values.dtype, device=values.device).T
        for layer in self._known():
            matrices = self._lifted(values.T.contiguous(), layer)
            own = matrices[..., : layer.columns].flatten(1)
            if layer.bias:
                own = torch.cat([own, matrices[..., layer.columns]], dim=1)
            scatter(out, own.T, layer.stretches)
        return out

    def _known(self) -> tuple[LayerMatrix, ...]:
        if self.layers is None:
            raise RefluenceError(
                f"{self!r} projects layer by layer and cannot tell the layers in plain rows: give gradient blocks of "
                "outer products, or `sketch.on(layers)`"
            )
        return self.layers
