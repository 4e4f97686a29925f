"""The factors of each layer's gradients and their covariances, whatever form the gradients are kept in.

Axis letters: b examples of a batch, t positions, q gradients an example, R rows and C columns of a weight matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from refluence.batches import rows_of
from refluence.curvature.outer import OuterCurvature
from refluence.gradients.blocks import CHUNK_ELEMENTS, GradientBlock
from refluence.gradients.capture import Capture
from refluence.gradients.extraction import Inputs, LayoutError, Owner, extract_one
from refluence.gradients.factors import Factor, OneHot
from refluence.gradients.fan import FanBlock
from refluence.gradients.joint import JointBlock
from refluence.gradients.outer import OuterBlock
from refluence.gradients.recording import record
from refluence.gradients.routes import Route


@dataclass(frozen=True)
class Layer:
    """The parameters of one gradient block, its place among the blocks of its group, and that of its columns."""

    group: str
    place: int
    route: Route
    stretches: tuple[tuple[int, int, int], ...]

    @property
    def owner(self) -> Owner:
        """Its parameters."""
        return self.route.owner

    @property
    def d(self) -> int:
        """The length of its gradients."""
        return sum(length for _, length, _ in self.stretches)

    def of(self, blocks: dict[str, JointBlock]) -> GradientBlock:
        """Its gradients in a batch."""
        return blocks[self.group].blocks[self.place]


def layers_of(capture: Capture) -> tuple[Layer, ...]:
    """The layers in the order of `JointBlock.blocks`, group by group."""
    return tuple(
        Layer(group, place, route, columns)
        for group, layers in capture.layout.items()
        for place, (route, columns) in enumerate(layers)
    )


def factored_batches(
    curvature: OuterCurvature, layers: Sequence[Layer], stretch: tuple[int, int] | None = None
) -> Iterator[tuple[int, dict[Layer, tuple[OuterBlock, ...] | None]]]:
    """(first example, layer → its q sums of outer products) for each batch, or for those of a stretch of the rows.

    None stands for a layer that has none there.

    Where rows take less memory than factors (many positions of a small layer), rows are what is kept, and the factors
    are made again for the batch. They are used where they give the rows that were kept.
    """
    rows, capture = curvature.features, curvature.features.capture
    dense: set[Layer] = set()
    for start, blocks in rows.made() if stretch is None else rows.over([stretch]):
        found: dict[Layer, tuple[OuterBlock, ...] | None] = {}
        for layer in layers:
            if (parts := _outer_parts(layer.of(blocks))) is not None:
                found[layer] = parts
            else:
                dense.add(layer)
        yield start, found
    if not dense:
        return
    kept = rows.made() if stretch is None else rows.over([stretch])
    for start, batch in capture.running(rows.batches if stretch is None else rows.batches.holding([stretch])):
        at, blocks = next(kept)
        assert at == start, "two passes over the rows have the same batches"
        lacking = [layer for layer in layers if layer in dense and _outer_parts(layer.of(blocks)) is None]
        if lacking:
            yield start, _made_again(curvature, start, batch, {layer: layer.of(blocks) for layer in lacking})


def _outer_parts(block: GradientBlock) -> tuple[OuterBlock, ...] | None:
    parts = block.parts if isinstance(block, FanBlock) else (block,)
    outer = tuple(part for part in parts if isinstance(part, OuterBlock))
    return outer if len(outer) == len(parts) else None


def _made_again(
    curvature: OuterCurvature, start: int, batch: Any, kept: dict[Layer, GradientBlock]
) -> dict[Layer, tuple[OuterBlock, ...] | None]:
    rows, capture = curvature.features, curvature.features.capture
    with capture.ready():
        at = rows.batches.first + start
        recording, columns = record(capture.model, capture.parameters, rows.objective, batch, at, rows.batches.name)
    found: dict[Layer, tuple[OuterBlock, ...] | None] = {}
    for layer, block in kept.items():
        inputs = Inputs(layer.route.layout, rows_of(batch))
        try:
            parts = tuple(
                extract_one(layer.owner, recording.uses, errors, capture.shapes, inputs) for errors in columns
            )
        except LayoutError:
            found[layer] = None
            continue
        outer = tuple(part for part in parts if isinstance(part, OuterBlock))
        found[layer] = outer if len(outer) == len(parts) and _agree(outer, block) else None
    return found


def _agree(parts: Sequence[OuterBlock], block: GradientBlock) -> bool:
    """Whether the parts are the rows of `block`, by their products with one random matrix u vᵀ (and bias)."""
    R, C, bias = parts[0].R, parts[0].C, parts[0].bias
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(size, generator=generator).to(block.device, torch.float64) for size in (R, C + int(bias)))
    flat = torch.cat([torch.outer(u, v[:C]).flatten(), *([u * v[C]] if bias else [])])
    found, sizes = [], []
    for part in parts:
        each = [
            _products(term.row, u) * (_products(term.column, v[:C]) + (v[C] if bias else 0.0)) for term in part.terms
        ]
        found.append(torch.cat(each, dim=1).sum(dim=1))
        sizes.append(torch.cat(each, dim=1).abs().sum(dim=1))
    expected = block.matvec(flat[:, None])[:, 0]
    # Rows that are wrong differ by their own size; √ε of it is far above rounding and far below that.
    scale = block.squared_norms().sqrt() + torch.cat(sizes)
    return bool(((torch.cat(found) - expected).abs() <= torch.finfo(block.dtype).eps ** 0.5 * scale).all())


def _products(factor: Factor, vector: Float64[Tensor, " k"]) -> Float64[Tensor, "b t"]:
    return vector[factor.index] if isinstance(factor, OneHot) else factor.vectors().double() @ vector


@dataclass
class Covariances:
    """Σ w r rᵀ over rows and Σ w c cᵀ over columns of the outer products, as matrices, or as their diagonals.

    Args:
        rows: (R, R), or (R) where all rows are unit vectors.
        columns: (C', C'), C' = C + 1 with a bias, for columns (c, 1).
        count: Σ w of the outer products.
        bias: whether the columns have a one at their end.
    """

    rows: Float64[Tensor, "..."]
    columns: Float64[Tensor, "..."]
    count: float
    bias: bool

    def add(self, other: Covariances) -> Covariances:
        """Those of more examples."""
        self.rows += other.rows
        self.columns += other.columns
        self.count += other.count
        return self

    def to(self, device: torch.device) -> Covariances:
        """The same on a device."""
        return replace(self, rows=self.rows.to(device), columns=self.columns.to(device))


def sides_of(parts: Sequence[OuterBlock]) -> tuple[int, int]:
    """The sizes of the covariance matrices of rows and columns; 1 where unit vectors need a diagonal only."""
    first = parts[0]
    unit = [all(isinstance(factor, OneHot) for factor in side) for side in _factors(parts)]
    return 1 if unit[0] else first.R, 1 if unit[1] and not first.bias else first.C + int(first.bias)


def _factors(parts: Sequence[OuterBlock]) -> tuple[list[Factor], list[Factor]]:
    terms = [term for part in parts for term in part.terms]
    return [term.row for term in terms], [term.column for term in terms]


def covariances(parts: Sequence[OuterBlock], weights: Float[Tensor, " b"] | None, sharing: str) -> Covariances:
    """Of a batch of q sums of outer products, in float64.

    Args:
        sharing: "expand": every position is an outer product; "reduce": the mean of a sum's columns with the sum of its
            rows. Unit vectors are always expanded, for the mean of several is none.
    """
    first, q = parts[0], len(parts)
    b, bias = first.n, first.bias
    total = float(b if weights is None else weights.sum())
    row_size, column_size = sides_of(parts)
    device = first.device

    def zeros(size: int, length: int) -> Tensor:
        return torch.zeros((length,) if size == 1 < length else (size, size), dtype=torch.float64, device=device)

    rows, columns = zeros(row_size, first.R), zeros(column_size, first.C + int(bias))
    every = _factors(parts)
    reduce = sharing == "reduce" and not any(isinstance(factor, OneHot) for side in every for factor in side)
    count = 0.0
    for terms in zip(*(part.terms for part in parts), strict=True):
        count += q * total * (1 if reduce else terms[0].row.t)
        for factor, times in _distinct([term.row for term in terms]):
            _add_moment(rows, factor, weights, times, False, "sum" if reduce else None)
        for factor, times in _distinct([term.column for term in terms]):
            _add_moment(columns, factor, weights, times, bias, "mean" if reduce else None)
    return Covariances(rows, columns, count, bias)


def _distinct(factors: list[Factor]) -> list[tuple[Factor, float]]:
    """What several gradients of an example share is taken once, times their number."""
    if all(factor is factors[0] for factor in factors):
        return [(factors[0], float(len(factors)))]
    return [(factor, 1.0) for factor in factors]


def _add_moment(
    out: Tensor, factor: Factor, weights: Tensor | None, times: float, bias: bool, over_positions: str | None
) -> None:
    if isinstance(factor, OneHot):
        given = torch.ones(factor.n, dtype=torch.float64, device=out.device) if weights is None else weights
        repeated = (given.to(out) * times)[:, None].expand(-1, factor.t).flatten()
        counts = torch.zeros(factor.k, dtype=torch.float64, device=out.device)
        counts.index_add_(0, factor.index.flatten(), repeated)
        (out if out.ndim == 1 else out.diagonal()).add_(counts)
        return
    step = max(1, CHUNK_ELEMENTS // max(1, factor.t * factor.k))
    for first in range(0, factor.n, step):
        last = min(first + step, factor.n)
        values = factor.rows(first, last).vectors()
        if over_positions is not None:
            values = values.double()
            values = values.sum(dim=1, keepdim=True) / (values.shape[1] if over_positions == "mean" else 1)
        vectors = torch.ones(*values.shape[:2], values.shape[2] + int(bias), dtype=torch.float64, device=out.device)
        vectors[..., : values.shape[2]] = values
        flat = vectors.flatten(0, 1)
        left = flat
        if weights is not None:
            left = (vectors * weights[first:last, None, None].to(vectors)).flatten(0, 1)
        out.addmm_(left.T, flat, alpha=times)
