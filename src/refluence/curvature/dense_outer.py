"""The matrix C of rows that are outer products with shared columns, from weighted Gram matrices of layers' inputs.

With rows e_q and column a of an example, Σ_q (e_q ⊗ a)(e_q ⊗ a)ᵀ = (Σ_q e_q e_qᵀ) ⊗ a aᵀ. So the block of rows r and s
of the weight matrices of two layers is Σ_i D_i a_i a'_iᵀ with D_i = Σ_q e_qr e'_qs, whatever q is.

Axis letters: q gradients an example, n examples, R rows and C columns of a weight matrix, p columns that vary, j pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from refluence.gradients.blocks import CHUNK_ELEMENTS
from refluence.gradients.fan import Shared
from refluence.gradients.joint import Stretches
from refluence.gradients.shared_factors import Layers

TILE_ROWS = 8192
TILE_ELEMENTS = 1 << 25
PANEL = 128
ENTRY = 40.0
"""Time of scaling one entry of a factor over that of one multiply-add of a matrix product, measured."""
ZERO_SUM = 16 * torch.finfo(torch.float64).eps


def shared_moment(
    batches: Iterable[tuple[Layers | None, Tensor | None]], d: int, device: torch.device
) -> Float[Tensor, "d d"] | None:
    """Σ_i w_i Σ_q f_iq f_iqᵀ in float64, symmetric to the last bit; None where dense rows take less, or are needed.

    Of two blocks that mirror each other one is computed, and of a block of one layer little more than half. Columns
    that are constant over the examples at hand count as one. Where the rows e add up to 0, as those of a softmax do,
    the blocks of a row with itself follow from the others.

    Args:
        batches: (factors, weights of the examples) of each batch; None for a batch with other gradients.
        d: parameters of the block.
    """
    moment = torch.zeros(d, d, dtype=torch.float64, device=device)
    places: list[_Layer] = []
    for tile in _tiles(batches):
        if tile is None or (not places and not shared_is_cheaper(tile[0], d)):
            return None
        places = [_Layer.of(shared, stretches) for shared, stretches in tile[0]]
        _add(moment, places, *tile)
    _mirror(moment, places)
    return moment


def shared_is_cheaper(layers: Layers, d: int) -> bool:
    """Whether Gram matrices of the columns take less than dense rows, counted in multiply-adds an example."""
    q = layers[0][0].rows.shape[0]
    heights = [shared.rows.shape[2] for shared, _ in layers]
    lengths = [shared.columns.shape[1] + shared.bias for shared, _ in layers]
    work = 0.0
    for i, (height, length) in enumerate(zip(heights, lengths, strict=True)):
        triangle = (1 + 1 / _panels(length)) / 2
        work += height * (height + 1) / 2 * (triangle * length**2 + ENTRY * length + q)
        for other, across in zip(heights[i + 1 :], lengths[i + 1 :], strict=True):
            work += height * other * (length * across + ENTRY * across + q)
    return work < q * d * (d + ENTRY)


Tile = tuple[Layers, Tensor | None]
"""Factors of some batches, and the weights of their examples."""


def _tiles(batches: Iterable[tuple[Layers | None, Tensor | None]]) -> Iterator[Tile | None]:
    """Batches put together until products of them are worth their overhead; None for one with other gradients."""
    waiting: list[Tile] = []
    rows = elements = 0
    for layers, weights in batches:
        if layers is None:
            yield None
            return
        size = sum(shared.rows.numel() + shared.columns.numel() for shared, _ in layers)
        count = layers[0][0].columns.shape[0]
        if waiting and (rows + count > TILE_ROWS or elements + size > TILE_ELEMENTS):
            yield _joined(waiting)
            waiting, rows, elements = [], 0, 0
        waiting.append((layers, weights))
        rows, elements = rows + count, elements + size
    if waiting:
        yield _joined(waiting)


def _joined(batches: list[Tile]) -> Tile:
    if len(batches) == 1:
        return batches[0]
    layers = []
    for parts in zip(*(layers for layers, _ in batches), strict=True):
        factors = [shared for shared, _ in parts]
        rows = torch.cat([shared.rows for shared in factors], dim=1)
        layers.append((Shared(rows, torch.cat([s.columns for s in factors]), factors[0].bias), parts[0][1]))
    given = [weights for _, weights in batches if weights is not None]
    return tuple(layers), torch.cat(given) if given else None


@dataclass(frozen=True, eq=False)
class _Layer:
    """Where a layer's parameters stand: its weight's rows one after the other from `weight`, its bias from `bias`."""

    R: int
    C: int
    weight: int
    bias: int | None

    @classmethod
    def of(cls, shared: Shared, stretches: Stretches) -> _Layer:
        R, C = shared.rows.shape[2], shared.columns.shape[1]
        starts = {own: whole for own, _, whole in stretches}
        return cls(R, C, starts[0], starts.get(R * C, starts[0] + R * C) if shared.bias else None)

    def places(self, r: int) -> list[tuple[slice, slice]]:
        """(stretch of the row's columns with the bias last, where it stands) of row r."""
        found = [(slice(0, self.C), slice(self.weight + r * self.C, self.weight + (r + 1) * self.C))]
        if self.bias is not None:
            found.append((slice(self.C, self.C + 1), slice(self.bias + r, self.bias + r + 1)))
        return found


@dataclass(frozen=True, eq=False)
class _Columns:
    """Columns of a tile without the constant ones: all = varying[:, index]·scale, where the last of `varying` is 1."""

    varying: Float[Tensor, "n p"]
    index: Int64[Tensor, " c"]
    scale: Float[Tensor, " c"]
    plain: bool

    @classmethod
    def of(cls, shared: Shared) -> _Columns:
        columns = shared.columns.double()
        n, count = columns.shape
        constant = columns.amin(dim=0) == columns.amax(dim=0)
        scale = torch.where(constant, columns[0], 1.0)
        ones = shared.bias or bool((constant & (scale != 0)).any())
        kept = (~constant).nonzero()[:, 0]
        index = torch.full((count,), len(kept) if ones else 0, dtype=torch.int64, device=columns.device)
        index[kept] = torch.arange(len(kept), device=columns.device)
        varying = columns if len(kept) == count else columns[:, kept]
        if ones or not len(kept):
            varying = torch.cat([varying, varying.new_ones(n, 1)], dim=1)
        if shared.bias:
            index, scale = torch.cat([index, index.new_tensor([len(kept)])]), torch.cat([scale, scale.new_ones(1)])
        return cls(varying, index, scale, plain=len(kept) == count)

    def expand(self, grams: Tensor, dim: int) -> Tensor:
        """Entries of all columns from those of the varying ones."""
        if self.plain:
            return grams
        return grams.index_select(dim, self.index) * self.scale.reshape(-1, *[1] * (grams.ndim - 1 - dim))


def _add(
    moment: Float[Tensor, "d d"], places: Sequence[_Layer], layers: Layers, weights: Float[Tensor, " n"] | None
) -> None:
    """Add the examples of a tile to the blocks (r, s) with r ≤ s of a layer, and of a layer with those after it."""
    rows = [shared.rows.double() for shared, _ in layers]
    columns = [_Columns.of(shared) for shared, _ in layers]
    for i, (own, at) in enumerate(zip(columns, places, strict=True)):
        left = rows[i] if weights is None else rows[i] * weights.to(rows[i])[:, None]
        zero_sum = bool((rows[i].sum(dim=2).abs() <= ZERO_SUM * rows[i].abs().max()).all())
        for r in range(at.R):
            for j in range(i, len(layers)):
                first = 0 if j > i else r + zero_sum
                if first >= places[j].R:
                    continue
                scales = torch.einsum("qn,qns->ns", left[:, :, r], rows[j][:, :, first:])
                step = max(1, CHUNK_ELEMENTS // max(1, columns[j].varying.numel()))
                for start in range(0, scales.shape[1], step):
                    part = scales[:, start : start + step]
                    grams = _symmetric(own.varying, part) if i == j else _cross(own.varying, columns[j].varying, part)
                    grams = columns[j].expand(own.expand(grams, 1), 2)
                    for s, gram in enumerate(grams, start=first + start):
                        _add_block(moment, gram, at, r, places[j], s)
                        if i == j and zero_sum:
                            _add_block(moment, -gram, at, r, at, r)
                            _add_block(moment, -gram, at, s, at, s)


def _add_block(moment: Tensor, gram: Float[Tensor, "c e"], at: _Layer, r: int, across: _Layer, s: int) -> None:
    for own, here in at.places(r):
        for other, there in across.places(s):
            moment[here, there] += gram[own, other]


def _cross(left: Float[Tensor, "n p"], right: Float[Tensor, "n t"], scales: Float[Tensor, "n j"]) -> Tensor:
    """Σ_i D_ij left_i right_iᵀ for every j: (j, p, t)."""
    scaled = (scales[:, :, None] * right[:, None, :]).flatten(1)
    return (left.T @ scaled).unflatten(1, (scales.shape[1], -1)).transpose(0, 1)


def _symmetric(columns: Float[Tensor, "n p"], scales: Float[Tensor, "n j"]) -> Float[Tensor, "j p p"]:
    """Σ_i D_ij a_i a_iᵀ for every j, by panels of what lies on and above the diagonal."""
    p = columns.shape[1]
    grams = columns.new_empty(scales.shape[1], p, p)
    bounds = [round(i * p / _panels(p)) for i in range(_panels(p) + 1)]
    for first, last in pairwise(bounds):
        panel = _cross(columns[:, :last], columns[:, first:last], scales)
        square = panel[:, first:]
        grams[:, :first, first:last] = panel[:, :first]
        grams[:, first:last, :first] = panel[:, :first].mT
        grams[:, first:last, first:last] = (square + square.mT) / 2
    return grams


def _panels(p: int) -> int:
    return max(1, p // PANEL)


def _mirror(moment: Float[Tensor, "d d"], layers: Sequence[_Layer]) -> None:
    """Fill in the blocks that mirror those computed."""
    rows = [(layer, r) for layer in layers for r in range(layer.R)]
    for i, (at, r) in enumerate(rows):
        for across, s in rows[i + 1 :]:
            for _, here in at.places(r):
                for _, there in across.places(s):
                    moment[there, here] = moment[here, there].T
