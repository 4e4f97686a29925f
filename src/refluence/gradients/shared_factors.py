"""Blocks whose layers are one outer product an example, with columns that an example's q gradients share.

Products of the curvature of a few examples, drawn from anywhere in the data, are made from their factors.

Axis letters: q gradients an example, n examples, R rows and C columns of a weight matrix, g sets of b examples, k
right-hand sides, c = k/g of them for each set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from refluence.gradients.blocks import GradientBlock
from refluence.gradients.fan import Shared, shared_of
from refluence.gradients.joint import JointBlock, Stretches, gather, scatter

Layers = tuple[tuple[Shared, Stretches], ...]


def shared_layers(block: GradientBlock) -> Layers | None:
    """Each layer's factors, and where its parameters stand in the block; None where a layer is of another kind."""
    if not isinstance(block, JointBlock):
        return None
    layers = [(shared_of(part), stretches) for part, stretches in zip(block.blocks, block.columns, strict=True)]
    return None if any(shared is None for shared, _ in layers) else tuple((s, at) for s, at in layers if s is not None)


def selected(batches: Sequence[tuple[int, Shared]], rows: Int64[Tensor, " b"]) -> Shared:
    """The factors of any examples, in this order, from (first example, factors) of batches."""
    if len(batches) == 1:
        [(_, shared)] = batches
        return Shared(shared.rows[:, rows], shared.columns[rows], shared.bias)
    order = torch.argsort(rows, stable=True)
    starts = torch.tensor([start for start, _ in batches], device=rows.device)
    counts = torch.bincount(torch.bucketize(rows, starts, right=True) - 1, minlength=len(batches)).tolist()
    pieces = [
        (shared.rows[:, part - start], shared.columns[part - start])
        for (start, shared), part in zip(batches, rows[order].split(counts), strict=True)
        if part.numel()
    ]
    back = torch.argsort(order)
    return Shared(
        torch.cat([part for part, _ in pieces], dim=1)[:, back],
        torch.cat([part for _, part in pieces])[back],
        batches[0][1].bias,
    )


def _products(shared: Shared, sets: int, vectors: Float[Tensor, "e k"]) -> Float[Tensor, "g b q c"]:
    """Inner products of the examples of each set with the c columns that are the set's own."""
    columns, rows = _by_set(shared, sets, vectors.dtype)
    given = vectors.T.unflatten(0, (sets, -1))
    weight = rows.shape[3] * columns.shape[2]
    fed = torch.bmm(columns, given[..., :weight].reshape(sets, -1, columns.shape[2]).mT)
    fed = fed.unflatten(2, (-1, rows.shape[3]))
    if shared.bias:
        fed = fed + given[:, None, :, weight:]
    return rows @ fed.mT


def _sums(shared: Shared, products: Float[Tensor, "g b q c"]) -> Float[Tensor, "e k"]:
    """The gradients of each set summed with these weights, one column for each of the set's c."""
    columns, rows = _by_set(shared, products.shape[0], products.dtype)
    combined = products.mT @ rows
    sums = torch.bmm(combined.flatten(2).mT, columns).unflatten(1, combined.shape[2:]).flatten(2)
    if shared.bias:
        sums = torch.cat([sums, combined.sum(dim=1)], dim=2)
    return sums.flatten(0, 1).T


def _by_set(shared: Shared, sets: int, dtype: torch.dtype) -> tuple[Float[Tensor, "g b C"], Float[Tensor, "g b q R"]]:
    columns = shared.columns.to(dtype).unflatten(0, (sets, -1))
    return columns, shared.rows.to(dtype).permute(1, 0, 2).unflatten(0, (sets, -1))


def batch_layers(batches: Iterable[tuple[int, GradientBlock]]) -> list[tuple[int, Layers]] | None:
    """(first example, layers) of every batch; None where one has a layer of another kind."""
    found = []
    for start, block in batches:
        layers = shared_layers(block)
        if layers is None:
            return None
        found.append((start, layers))
    return found


def sampled_products(
    batches: list[tuple[int, Layers]],
    rows: Int64[Tensor, "g b"],
    weights: Float[Tensor, " n"] | None,
    vectors: Float[Tensor, "d k"],
) -> Float[Tensor, "d k"]:
    """(1/b) Σ w Σ_q f_q f_qᵀ V over each of g sets of b examples, on the set's own share of the columns."""
    flat = rows.flatten()
    layers = [
        (selected([(start, layers[i][0]) for start, layers in batches], flat), stretches)
        for i, (_, stretches) in enumerate(batches[0][1])
    ]
    products = sum(_products(shared, rows.shape[0], gather(vectors, stretches)) for shared, stretches in layers)
    assert isinstance(products, Tensor)
    if weights is not None:
        products *= weights.to(products)[rows][..., None, None]
    out = torch.empty(vectors.shape[1], vectors.shape[0], dtype=vectors.dtype, device=vectors.device).T
    for shared, stretches in layers:
        scatter(out, _sums(shared, products), stretches)
    return out.div_(rows.shape[1])
