"""A state whose layers are each diagonal in an eigenbasis that is a Kronecker product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from refluence.curvature import OuterCurvature, Vectors
from refluence.curvature.kronecker import KINDS, KroneckerBlock, Rotated, rotated
from refluence.curvature.layer_factors import Layer, layers_of
from refluence.gradients.blocks import accumulation_dtype
from refluence.gradients.joint import gather, scatter
from refluence.gradients.rows import GradientRows
from refluence.solvers.kronecker_products import LayerScores
from refluence.solvers.state import CHUNK_BYTES, OperatorState, Shifts, Solution, cut_rows, refuse_singular
from refluence.theory import SpectralMeasure


class KroneckerState(OperatorState):
    """(C_l + μ)⁻¹V = Q_E((Q_EᵀVQ_A)/(Λ+μ))Q_Aᵀ of every layer l.

    Args:
        layers: what each block of gradients holds.
        bases: eigenvectors and eigenvalues of each.
        updated: whether the eigenvalues add up to the traces of the curvature.
    """

    curvature: OuterCurvature
    knows_spectrum = True

    def __init__(
        self, curvature: OuterCurvature, layers: Sequence[Layer], bases: Sequence[KroneckerBlock], updated: bool
    ) -> None:
        super().__init__(curvature)
        self.layers, self.bases, self.updated = tuple(layers), tuple(bases), updated
        self._traces: dict[str, float] | None = None
        titles = {
            "kronecker": "kronecker layers",
            "dense": "dense blocks",
            "diagonal": "diagonal blocks",
            "zero": "unused",
        }
        for kind, title in titles.items():
            self.diagnostics[title] = [
                name for layer, basis in self._all() if basis.kind == kind for name in layer.owner.names
            ]

    @property
    def product_dtype(self) -> torch.dtype:
        """That of the gradients, at least float32."""
        return accumulation_dtype(self.curvature.dtype)

    def export(self) -> dict[str, Tensor]:
        """Eigenvectors and eigenvalues, layer by layer."""
        tensors = {}
        for i, basis in enumerate(self.bases):
            tensors[f"kind/{i}"] = torch.tensor([KINDS.index(basis.kind), int(basis.bias)])
            tensors[f"values/{i}"] = basis.values
            if basis.rows is not None:
                tensors[f"rows/{i}"] = basis.rows
            if basis.columns is not None:
                tensors[f"columns/{i}"] = basis.columns
        return tensors

    def spectra(self) -> dict[str, SpectralMeasure]:
        """Block → Λ of its layers."""
        found: dict[str, list[Tensor]] = {}
        for layer, basis in self._all():
            found.setdefault(layer.group, []).append(basis.values.flatten())
        return {b: SpectralMeasure(np.sort(torch.cat(values).cpu().numpy())) for b, values in found.items()}

    @property
    def traces(self) -> dict[str, float]:  # type: ignore[override]
        """Block → tr C_b; the eigenvalues of EK-FAC add up to it."""
        if self._traces is None:
            spectra = self.spectra() if self.updated else None
            self._traces = (
                self.curvature.traces() if spectra is None else {b: measure.trace for b, measure in spectra.items()}
            )
        return self._traces

    def _of(self, group: str) -> Iterator[tuple[Layer, KroneckerBlock]]:
        for layer, basis in self._all():
            if layer.group == group:
                yield layer, basis

    def _inverses(self, layer: Layer, basis: KroneckerBlock, shift: float) -> Float64[Tensor, "R C"]:
        """1/(Λ+μ)."""
        values = basis.values
        if shift == 0:
            floor = values.numel() * torch.finfo(self.product_dtype).eps * float(values.max())
            refuse_singular(int((values > floor).sum()), values.numel(), layer.group)
        return 1.0 / (values + shift)

    def solve(self, vectors: Vectors, shifts: Shifts) -> Solution:
        """(C_b+μ_b)⁻¹V_b, layer by layer."""
        found = {}
        for block, v in vectors.items():
            out = torch.empty(v.shape[1], v.shape[0], dtype=v.dtype, device=v.device).T
            for layer, basis in self._of(block):
                own = gather(v, layer.stretches).T.to(self.product_dtype)
                turned = basis.rotate(own) * self._inverses(layer, basis, shifts[block]).to(own)
                scatter(out, basis.unrotate(turned).T.to(v.dtype), layer.stretches)
            found[block] = out
        return Solution(found)

    def _over_train(self, shifts: Shifts, squared: bool) -> Float[Tensor, " n"]:
        power = 2 if squared else 1
        weights = [self._inverses(layer, basis, shifts[layer.group]) ** power for layer, basis in self._all()]
        found = self.curvature.rows.by_row(_norms, self.bases, weights, self.product_dtype)
        total = found.to(self.curvature.device)
        return total if self.curvature.weights is None else total * self.curvature.weights.to(total) ** power

    def scores(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[str, Float[Tensor, "k n"]]]:
        """Block → τ(v_i, w_j g_j)."""
        parts: dict[str, list[Tensor]] = {group: [] for group in self.curvature.groups}
        for count, tile in self._tiles(tests, shifts):
            found = self.curvature.rows.by_row(_scores, tile, count)
            for group, values in found.items():
                parts[group].append(values.T.to(self.curvature.device))
        for group, tiles in parts.items():
            values = torch.cat(tiles)
            yield group, values if self.curvature.weights is None else values * self.curvature.weights.to(values)

    def _tiles(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[int, list[LayerScores]]]:
        """(number of tests, their side of every layer), as many as a bounded memory holds."""
        for layer, basis in self._all():
            self._inverses(layer, basis, shifts[layer.group])  # refuses what has no inverse
        size = max(1, CHUNK_BYTES // (8 * sum(self.dimensions.values())))
        waiting: list[list[Rotated]] = [[] for _ in self.layers]
        count = 0
        for last, some in cut_rows(tests, size):
            for held, (layer, basis) in zip(waiting, self._all(), strict=True):
                held.append(rotated(layer.of(some), basis, self.product_dtype))
            count += next(iter(some.values())).n
            if last:
                yield (
                    count,
                    [
                        LayerScores(basis, held, shifts[layer.group], self.product_dtype)
                        for held, (layer, basis) in zip(waiting, self._all(), strict=True)
                    ],
                )
                waiting, count = [[] for _ in self.layers], 0

    def _all(self) -> Iterator[tuple[Layer, KroneckerBlock]]:
        return zip(self.layers, self.bases, strict=True)


def _norms(
    rows: GradientRows, bases: Sequence[KroneckerBlock], weights: Sequence[Tensor], dtype: torch.dtype
) -> Float[Tensor, " n"]:
    """Σ_l Σ_jk W_jk X_ijk² of every example's gradient X in the eigenbasis of each layer l."""
    layers = layers_of(rows.capture)
    total = torch.zeros(rows.n, dtype=torch.float64, device=rows.device)
    for start, blocks in rows:
        for layer, basis, own in zip(layers, bases, weights, strict=True):
            block = layer.of(blocks)
            total[start : start + block.n] += rotated(block, basis, dtype).norms(own)
    return total


def _scores(rows: GradientRows, tile: Sequence[LayerScores], count: int) -> dict[str, Float[Tensor, "n k"]]:
    """Block → the scores of a tile of tests with every train gradient."""
    layers = layers_of(rows.capture)
    out = {g: torch.zeros(count, rows.n, dtype=torch.float64, device=rows.device) for g in rows.groups}
    for start, blocks in rows:
        for layer, scores in zip(layers, tile, strict=True):
            block = layer.of(blocks)
            out[layer.group][:, start : start + block.n] += scores.products(block).T
    return {group: values.T for group, values in out.items()}
