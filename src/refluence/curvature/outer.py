"""Curvatures that are a sum of outer products of gradient rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from refluence.curvature.base import Curvature, Vectors
from refluence.curvature.dense_outer import shared_moment
from refluence.errors import PlanError
from refluence.gradients.blocks import CHUNK_ELEMENTS, GradientBlock
from refluence.gradients.parts import Parts
from refluence.gradients.rows import GradientRows
from refluence.gradients.selection import select_rows
from refluence.gradients.shared_factors import Layers, batch_layers, sampled_products, shared_layers


class OuterCurvature(Curvature):
    """C = (1/n) Σ_i w_i Σ_q f_iq f_iqᵀ, where f_iq are q gradients for each example.

    The empirical Fisher has f = the gradient of the loss; the GGN f = Jᵀ(∂²ℓ)^½, one row for each output; the true
    Fisher the expectation over the model's own labels, exact or by samples.

    Args:
        features: f; for the empirical Fisher, `rows` itself.
    """

    def __init__(
        self, name: str, rows: GradientRows, features: GradientRows, weights: Float[Tensor, " n"] | None = None
    ) -> None:
        super().__init__(name, rows, weights, positive=True)
        self.features = features

    @property
    def q(self) -> int:
        """Feature rows an example."""
        return self.features.q

    @property
    def own_rows(self) -> bool:
        """Whether the rows are the training gradients themselves."""
        return self.features is self.rows

    def feature_weights(self, start: int, rows: int) -> Float[Tensor, " rows"] | None:
        """w of the feature rows of the batch that begins at example `start`."""
        if self.weights is None:
            return None
        return self.weights[start : start + rows // self.q].to(self.device).repeat(self.q)

    @property
    def row_weights(self) -> Float[Tensor, " N"] | None:
        """w of all feature rows, in the order of `gram_matrices`."""
        if self.weights is None:
            return None
        size = self.features.batches.batch_size
        return torch.cat([part.repeat(self.q) for part in self.weights.to(self.device).split(size)])

    def lie_in(self, parts: Parts) -> None:
        """Let every pass over the data be made in these parts."""
        super().lie_in(parts)
        if not self.own_rows:
            self.features.parts, self.features.role = parts, "features"

    def matvec(self, vectors: Vectors) -> Vectors:
        """Block → C_b V_b, in one pass over the rows."""
        found = self.total(_products, vectors)
        return {block: found[block].to(v.device) for block, v in vectors.items()}

    def sampled(self, rows: Int64[Tensor, " b"], vectors: Vectors) -> Vectors:
        """Block → (1/b) Σ_{i ∈ rows} w_i C_i V."""
        found = self.total(_sampled_products, rows, vectors)
        return {block: found[block].to(v.device) / rows.numel() for block, v in vectors.items()}

    def sampled_each(self, rows: Int64[Tensor, "g b"], vectors: Vectors) -> Vectors:
        """`sampled` for g sets of b examples side by side, where every layer has one outer product an example."""
        k = next(iter(vectors.values())).shape[1]
        layers = self._layers if self.features.kept and self.parts is None else {}
        out = {}
        for block, v in vectors.items():
            batches = layers.get(block)
            if batches is None or rows.shape[1] * k * widest(batches[0][1]) > CHUNK_ELEMENTS:
                return super().sampled_each(rows, vectors)
            out[block] = sampled_products(batches, rows, self.weights, v)
        return out

    @cached_property
    def _layers(self) -> dict[str, list[tuple[int, Layers]] | None]:
        """Block → the factors of every batch of kept features, None where a layer has no shared ones."""
        return {block: batch_layers((start, blocks[block]) for start, blocks in self.features) for block in self.groups}

    def _dense(self, block: str) -> Float[Tensor, "d d"]:
        return self.total(_moment, block).to(self.device).div_(self.n)

    def _factors(self, block: str) -> Iterator[tuple[Layers | None, Tensor | None]]:
        """(factors, weights of the examples) of every batch; None where a layer has no shared ones."""
        for start, blocks in self.features:
            count = blocks[block].n // self.q
            weights = None if self.weights is None else self.weights[start : start + count].to(self.device)
            yield shared_layers(blocks[block]), weights

    def diagonal(self) -> dict[str, Float[Tensor, " d"]]:
        """Block → the diagonal of C_b."""
        return {block: total.to(self.device) / self.n for block, total in self.total(_diagonals).items()}

    def traces(self) -> dict[str, float]:
        """Block → tr C_b, the weighted mean squared norm of its rows."""
        if self.own_rows:
            w = self.weights
            squares = {b: v if w is None else v * w.to(v) for b, v in self.rows.squared_norms().items()}
            return {block: float(of_rows.sum()) / self.n for block, of_rows in squares.items()}
        return {block: total / self.n for block, total in self.total(_traces).items()}


def _products(part: OuterCurvature, vectors: Vectors) -> Vectors:
    """Block → C_b V_b."""
    out = {block: torch.zeros_like(v) for block, v in vectors.items()}
    for start, blocks in part.features:
        weights = part.feature_weights(start, next(iter(blocks.values())).n)
        for block, v in vectors.items():
            _add_product(out[block], blocks[block], v, weights, 1 / part.n)
    return out


def _sampled_products(part: OuterCurvature, rows: Int64[Tensor, " b"], vectors: Vectors) -> Vectors:
    """Block → Σ w_i C_i V over those of the rows that are the part's."""
    features = part.features
    if not features.at_hand:
        for _ in features:
            pass
    if not features.at_hand:
        raise PlanError("the gradients do not fit the memory, so batches of them cannot be drawn: use batch_size=None")
    rows = part.rows.own(rows)
    out = {block: torch.zeros_like(v) for block, v in vectors.items()}
    for start, blocks in features:
        count = next(iter(blocks.values())).n // part.q
        chosen = rows[(rows >= start) & (rows < start + count)] - start
        if not chosen.numel():
            continue
        weights = None if part.weights is None else part.weights[chosen.cpu() + start].repeat(part.q)
        among = torch.cat([c * count + chosen for c in range(part.q)])
        for block, v in vectors.items():
            _add_product(out[block], select_rows(blocks[block], among), v, weights, 1.0)
    return out


def _moment(part: OuterCurvature, block: str) -> Float[Tensor, "d d"]:
    """n C_b, symmetric to the last bit."""
    d = part.dimensions[block]
    if (shared := shared_moment(part._factors(block), d, part.device)) is not None:
        return shared
    moment = torch.zeros(d, d, dtype=torch.float64, device=part.device)
    step = max(1, CHUNK_ELEMENTS // max(1, d))
    for start, blocks in part.features:
        rows = blocks[block]
        weights = part.feature_weights(start, rows.n)
        for first in range(0, rows.n, step):
            values = rows.rows(first, min(first + step, rows.n)).dense().double()
            left = values if weights is None else values * weights[first : first + step, None]
            moment.addmm_(left.T, values)
    return (moment + moment.T) / 2


def _diagonals(part: OuterCurvature) -> dict[str, Float[Tensor, " d"]]:
    """Block → n times the diagonal of C_b."""
    totals = {b: torch.zeros(d, dtype=torch.float64, device=part.device) for b, d in part.dimensions.items()}
    for start, blocks in part.features:
        for block, rows in blocks.items():
            weights = part.feature_weights(start, rows.n)
            for first, values in rows.chunks(max(1, CHUNK_ELEMENTS // rows.n)):
                squares = values.double().square()
                summed = squares.sum(dim=0) if weights is None else weights @ squares
                totals[block][first : first + values.shape[1]] += summed
    return totals


def _traces(part: OuterCurvature) -> dict[str, float]:
    """Block → n tr C_b."""
    totals = dict.fromkeys(part.groups, 0.0)
    for start, blocks in part.features:
        for block, rows in blocks.items():
            norms = rows.squared_norms()
            weights = part.feature_weights(start, rows.n)
            totals[block] += float((norms if weights is None else norms * weights).sum())
    return totals


def widest(layers: Layers) -> int:
    """The most rows of a layer's weight matrix."""
    return max(shared.rows.shape[2] for shared, _ in layers)


def _add_product(
    out: Float[Tensor, "d k"], rows: GradientBlock, vectors: Float[Tensor, "d k"], weights: Tensor | None, scale: float
) -> None:
    """Add scale · Σ w f fᵀ V to `out`."""
    products = rows.matvec(vectors).mul_(scale)
    if weights is not None:
        products *= weights[:, None].to(products)
    rows.add_rmatvec(out, products)
