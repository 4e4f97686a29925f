"""The sums over the rows that K-FAC and EK-FAC are made of, read from a store where they are there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from refluence.curvature import OuterCurvature
from refluence.curvature.kronecker import KroneckerBlock, squared_moment
from refluence.curvature.layer_factors import Covariances, covariances, factored_batches, layers_of, sides_of
from refluence.curvature.sketched_factors import FactorSketch
from refluence.gradients.blocks import CHUNK_ELEMENTS, GradientBlock, ZeroBlock
from refluence.gradients.parts import added
from refluence.gradients.rows import BlocksOfBatch
from refluence.progress import track
from refluence.store.held import Report
from refluence.store.sums import BASES, SUMS, Sums

Stretch = tuple[int, int]
NONE, COUNT = "none", "count and bias"
SIDES = ("rows", "columns")


@dataclass(frozen=True)
class Wanted:
    """What the second pass is to sum, by the number of the layer: whole moments, diagonals, eigenvalues in a basis."""

    whole: tuple[int, ...]
    diagonal: tuple[int, ...]
    updated: dict[int, KroneckerBlock]

    def describe(self) -> dict[str, Any]:
        """All of it by name, the bases by a digest."""
        digest = hashlib.sha256()
        for i, block in self.updated.items():
            digest.update(f"{i} {block.bias} {tuple(block.values.shape)}".encode())
            for basis in (block.rows, block.columns):
                digest.update(b"none" if basis is None else basis.detach().cpu().contiguous().numpy().tobytes())
        return {"whole": list(self.whole), "diagonal": list(self.diagonal), BASES: digest.hexdigest()[:32]}


def first_pass(
    part: OuterCurvature,
    numbers: Mapping[int, FactorSketch | None],
    limit: int,
    sharing: str,
    described: Mapping[str, Any],
) -> tuple[dict[int, Covariances | None], Report | None]:
    """Number of the layer → sums over its rows, None for one without factors in some batch or with too large ones.

    Args:
        described: the solver, for the store.
    """

    def make(stretch: Stretch | None) -> dict[int, Covariances | None]:
        return _covariances(part, numbers, limit, sharing, stretch)

    keeping = part.rows.keeping
    if keeping is None or keeping.place is None:
        return make(None), None
    about = {SUMS: "covariances", **described, "factored": list(numbers), **_layers(part)}
    stored = keeping.sums(part.rows, part.weights, about)
    total: dict[int, Covariances | None] = {}
    for sums in stored.each(lambda start, stop: _packed(make((start, stop)))):
        total = added(total, _unpacked(sums, part.device))
    return total, stored.report


def second_pass(
    part: OuterCurvature, wanted: Wanted, dtype: torch.dtype, described: Mapping[str, Any]
) -> tuple[dict[int, Tensor], Report | None]:
    """Number of the layer → its sum over the rows; none for a layer that no example uses."""

    def make(stretch: Stretch | None) -> dict[int, Tensor]:
        return _moments(part, wanted, dtype, stretch)

    keeping = part.rows.keeping
    if keeping is None or keeping.place is None:
        return make(None), None
    about = {SUMS: "eigenvalues", **described, **wanted.describe(), "dtype of products": str(dtype), **_layers(part)}
    stored = keeping.sums(part.rows, part.weights, about)
    total: dict[int, Tensor] = {}

    def flat(start: int, stop: int) -> Sums:
        return {str(i): sums.reshape(len(sums), -1) for i, sums in make((start, stop)).items()}

    for sums in stored.each(flat):
        here = {int(i): values.to(part.device) for i, values in sums.items()}
        total = added(total, {i: values[:, 0] if i in wanted.diagonal else values for i, values in here.items()})
    return total, stored.report


def _layers(part: OuterCurvature) -> dict[str, Any]:
    """Which parameters the numbers are of, and how their gradients are made."""
    layers = layers_of(part.features.capture)
    return {"layers": [[*layer.owner.names, layer.route.kind] for layer in layers]}


def _covariances(
    part: OuterCurvature,
    numbers: Mapping[int, FactorSketch | None],
    limit: int,
    sharing: str,
    stretch: Stretch | None,
) -> dict[int, Covariances | None]:
    layers = layers_of(part.features.capture)
    order = {layers[i]: i for i in numbers}
    found: dict[int, Covariances | None] = {}
    for start, factors in factored_batches(part, list(order), stretch):
        for layer, parts in factors.items():
            i = order[layer]
            sketch = numbers[i]
            if i in found and found[i] is None:
                continue
            if parts is not None and sketch is not None:
                parts = sketch.project(parts)
            if parts is None or max(sides_of(parts)) > limit:
                found[i] = None
                continue
            weights = part.weights
            if weights is not None:
                weights = weights[start : start + parts[0].n].to(part.device)
            more = covariances(parts, weights, sharing)
            total = found.get(i)
            found[i] = more if total is None else total.add(more)
    return found


def _moments(part: OuterCurvature, wanted: Wanted, dtype: torch.dtype, stretch: Stretch | None) -> dict[int, Tensor]:
    layers = layers_of(part.features.capture)
    totals: dict[int, Tensor] = {}
    for start, blocks in _batches(part, stretch):
        for i in (*wanted.whole, *wanted.diagonal, *wanted.updated):
            block = layers[i].of(blocks)
            if isinstance(block, ZeroBlock):
                continue
            weights = part.weights
            if weights is not None:
                weights = weights[start : start + block.n // part.q].to(part.device)
            if i in wanted.updated:
                found = squared_moment(block, wanted.updated[i], weights, dtype)
            else:
                own = None if weights is None else weights.repeat(part.q)
                found = (_moment if i in wanted.whole else _diagonal)(block, own)
            totals[i] = totals[i].add_(found) if i in totals else found
    return totals


def _batches(part: OuterCurvature, stretch: Stretch | None) -> Iterator[tuple[int, BlocksOfBatch]]:
    features = part.features
    if stretch is not None:
        return features.within(*stretch)
    return track(features, "eigenvalues of layers", len(features.batches), features.progress and features.kept)


def _packed(found: Mapping[int, Covariances | None]) -> Sums:
    """Covariances by name, diagonals as columns."""
    sums: Sums = {}
    for i, own in found.items():
        if own is None:
            sums[f"{i} {NONE}"] = torch.zeros(1, 1, dtype=torch.float64)
            continue
        sums[f"{i} {COUNT}"] = torch.tensor([[own.count, float(own.bias)]], dtype=torch.float64)
        for side, matrix in zip(SIDES, (own.rows, own.columns), strict=True):
            sums[f"{i} {side}"] = matrix if matrix.ndim == 2 else matrix[:, None]
    return sums


def _unpacked(sums: Sums, device: torch.device) -> dict[int, Covariances | None]:
    found: dict[int, Covariances | None] = {}
    for name, values in sums.items():
        number, _, what = name.partition(" ")
        if what == NONE:
            found[int(number)] = None
        elif what == COUNT:
            count, bias = values[0].tolist()
            sides = (sums[f"{number} {side}"].to(device) for side in SIDES)
            # A column is a diagonal; a matrix of one row is the same either way.
            rows, columns = (side[:, 0] if side.shape[1] == 1 < side.shape[0] else side for side in sides)
            found[int(number)] = Covariances(rows, columns, count, bool(bias))
    return found


def _moment(block: GradientBlock, weights: Float[Tensor, " b"] | None) -> Float64[Tensor, "d d"]:
    """Σ w g gᵀ."""
    values = block.dense().double()
    return (values if weights is None else values * weights[:, None]).T @ values


def _diagonal(block: GradientBlock, weights: Float[Tensor, " b"] | None) -> Float64[Tensor, " d"]:
    """Σ w g²."""
    total = torch.zeros(block.d, dtype=torch.float64, device=block.device)
    for first, values in block.chunks(max(1, CHUNK_ELEMENTS // block.n)):
        squares = values.double().square()
        total[first : first + values.shape[1]] = squares.sum(dim=0) if weights is None else weights @ squares
    return total
