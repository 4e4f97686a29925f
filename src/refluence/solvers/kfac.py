"""Inverses by Kronecker factors of each layer: K-FAC and EK-FAC."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from refluence.curvature import Curvature, OuterCurvature
from refluence.curvature.kronecker import KINDS, KroneckerBlock, dense_block, kronecker_block
from refluence.curvature.layer_factors import Covariances, Layer, layers_of
from refluence.curvature.sketched_factors import FactorSketch
from refluence.errors import PlanError
from refluence.gradients.blocks import accumulation_dtype
from refluence.sketches import Kronecker, Sketch
from refluence.solvers.cost import Cost, Workload
from refluence.solvers.kronecker_state import KroneckerState
from refluence.solvers.kronecker_sums import Wanted, first_pass, second_pass
from refluence.solvers.projection import block_sketches
from refluence.store.fingerprint import sketch_fingerprint
from refluence.store.held import Report

SHARINGS = ("expand", "reduce")
EIGENVECTORS_WORK = 27.0
"""Time of LAPACK's symmetric eigenvectors over that of n³/3 multiply-adds."""


@dataclass(frozen=True, kw_only=True)
class KroneckerSolver(ABC):
    """What K-FAC and EK-FAC have in common.

    Args:
        sharing: how a weight that is used at several positions t of an example is treated, F = Σ_t e_t ⊗ a_t
            (Eschenhagen et al. 2023). "expand": as if every position were an example of its own, exact for a deep
            linear network whose loss sums over positions (a language model's). "reduce": F ≈ (Σ_t e_t) ⊗ mean_t a_t,
            exact for one that averages its positions before the loss (a classifier of pooled patches). The default is
            "expand": its factors have full rank after few examples, it is K-FAC for convolutions (Grosse & Martens
            2016), and it alone keeps the covariance of an embedding's tokens diagonal, so embeddings are expanded in
            both.
        dense_limit: a layer without a Kronecker form (norms, biases in a block of their own, grouped convolutions) is
            taken whole up to so many parameters, beyond it by its diagonal. Both are listed in the diagnostics.
        factor_limit: the most inputs or outputs of a layer whose covariance is formed; a larger layer counts as one
            without a Kronecker form.
        sketch: a `Kronecker`, P_E ⊗ P_A for each layer, whose factors become P_E E P_Eᵀ and P_A A P_Aᵀ and its scores
            (Pv)ᵀ(PCPᵀ+μI)⁻¹(Pg), as published, without error bars (arXiv 2602.10449, Thm 6). Factors of
            size m_e and m_a are then all that is formed, so that no layer is too large; a factor that has fewer rows
            or columns than that is kept as it is by an orthogonal sketch.
    """

    sharing: str = "expand"
    dense_limit: int = 1024
    factor_limit: int = 8192
    sketch: Sketch | None = None

    needs_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.sharing not in SHARINGS:
            raise PlanError(f'{name}: sharing must be "expand" or "reduce", not {self.sharing!r}')
        for limit in ("dense_limit", "factor_limit"):
            if getattr(self, limit) < 0:
                raise PlanError(f"{name}: {limit} must not be negative, it is {getattr(self, limit)}")
        if self.sketch is not None and not isinstance(self.sketch, Kronecker):
            raise PlanError(
                f"{name}: sketch must be a rf.sketches.Kronecker, which keeps the factors apart, not "
                f"{type(self.sketch).__name__}; any sketch of whole gradients goes with rf.solvers.Sketched"
            )

    @property
    def singular(self) -> bool:
        """Whether solutions lie in a subspace, so that it cannot precondition."""
        return self.sketch is not None

    @property
    @abstractmethod
    def updated(self) -> bool:
        """Whether the eigenvalues are those of EK-FAC."""

    def prepare(self, curvature: Curvature) -> KroneckerState:
        """The eigenbasis of every layer from one pass over the rows, and what else needs a second one.

        Raises:
            PlanError: a curvature that has no rows.
        """
        outer = self._with_rows(curvature)
        layers = layers_of(outer.features.capture)
        blocks, reports = _blocks(outer, layers, self)
        state = KroneckerState(outer, layers, blocks, self._whole_traces)
        if reports:
            state.diagnostics["store"] = [report.record() for report in reports]
        return state

    @property
    def described(self) -> dict[str, Any]:
        """What decides the sums over the rows beside these."""
        sketch = None if self.sketch is None else sketch_fingerprint(self.sketch)
        return {"sharing": self.sharing, "factor_limit": self.factor_limit, "sketch of factors": sketch}

    def restore(self, curvature: Curvature, tensors: dict[str, Tensor]) -> KroneckerState:
        """The state from what it exported."""
        outer = self._with_rows(curvature)
        layers = layers_of(outer.features.capture)
        return KroneckerState(outer, layers, _exported(tensors, layers), self._whole_traces)

    @property
    def _whole_traces(self) -> bool:
        return self.updated and self.sketch is None

    def _with_rows(self, curvature: Curvature) -> OuterCurvature:
        if not isinstance(curvature, OuterCurvature):
            raise PlanError(
                f'solver {type(self).__name__} takes its factors from the rows of a curvature, and "{curvature.name}" '
                'of this task has none that fit: use curvature "mc_fisher", "fisher", or "ggn" or "true_fisher" with '
                "few outputs"
            )
        return curvature

    def cost(self, w: Workload) -> Cost:
        """Bounded by a square layer in each block: two matrices of d entries, their eigenvectors, three rotations.

        Layers that see one position an example are scored through their factors, others by d products a pair.
        """
        if w.q is None:
            return Cost.impossible(
                'the curvature has no rows that fit; curvature "mc_fisher" has, for every loss with a distribution'
            )
        sides = [(d, d**0.5) for d in w.dimensions.values()]
        eigen = sum(2 * EIGENVECTORS_WORK * side**3 / 3 for _, side in sides)
        rows = w.n * w.q * sum(2.0 * d for d, _ in sides)
        if isinstance(self.sketch, Kronecker):
            own = self.sketch.m_e, self.sketch.m_a
            eigen = sum(EIGENVECTORS_WORK * min(m, side) ** 3 / 3 for _, side in sides for m in own)
            rows = w.n * w.q * sum(side * min(m, side) + min(m, side) ** 2 for _, side in sides for m in own)
        updates = w.n * w.q * sum(3.0 * d for d, _ in sides) if self.updated else 0.0
        scores = w.dot_work + sum((w.n + w.tests * (2 * side + 1)) * 2 * d for d, side in sides)
        return Cost(
            fixed=sum(2.0 * w.itemsize * d + 24.0 * d for d, _ in sides) + w.test_bytes + w.score_bytes,
            kept=w.n * (w.bytes_per_row + w.feature_bytes_per_row),
            work=rows + updates + eigen + scores,
            passes=4.0 if self.updated else 3.0,
        )


@dataclass(frozen=True, kw_only=True)
class Kfac(KroneckerSolver):
    """C ≈ E ⊗ A for each layer, with exact damping: 1/(ε_i α_j + μ) in the joint eigenbasis.

    A = Σ_iqt w_i ã ãᵀ/Σ w_i q t of the layer's inputs ã = (a, 1), E = (1/n) Σ_iqt w_i e eᵀ of the gradients of its
    outputs, weight and bias together; layers do not interact, whatever the blocks. Exact for one example at one
    position and for the GGN of a deep linear network with squared loss. Factors are summed in float64; eigenvectors and
    products with them are in the dtype of the gradients, at least float32.

    Curvatures: "fisher", "mc_fisher", and "ggn" and "true_fisher" where their rows fit.

    Sources: Martens & Grosse (2015); convolutions: Grosse & Martens (2016); shared weights: Eschenhagen et al. (2023).
    """

    @property
    def updated(self) -> bool:
        """No: ε_i α_j."""
        return False


@dataclass(frozen=True)
class Ekfac(KroneckerSolver):
    """The eigenbasis of K-FAC with the best eigenvalues in it: Λ_ij = (1/n) Σ w Σ_q ((Q_EᵀFQ_A)_ij)².

    Its trace is that of the layer's curvature. A layer that sees one position an example takes two rotations of its
    factors and one matrix product of their squares; no gradient is formed.

    Args:
        update_eigenvalues: False leaves K-FAC's, and is `Kfac`.

    Source: George et al. (2018), eq. 7; otherwise as `Kfac`.
    """

    update_eigenvalues: bool = True

    @property
    def updated(self) -> bool:
        """Whether the eigenvalues are those of EK-FAC."""
        return self.update_eigenvalues


def _blocks(
    curvature: OuterCurvature, layers: tuple[Layer, ...], solver: KroneckerSolver
) -> tuple[list[KroneckerBlock], list[Report]]:
    """The eigenbasis and eigenvalues of every layer, and what the store of their sums did, pass by pass."""
    dtype = accumulation_dtype(curvature.features.dtype)
    sketches = _factor_sketches(curvature, layers, solver, dtype)
    factors, report = _covariances(curvature, layers, solver, sketches)
    reports = [] if report is None else [report]
    found = {layer: kronecker_block(own, curvature.n, dtype) for layer, own in factors.items()}
    found |= {layer: sketches[layer].lift(block) for layer, block in found.items() if layer in sketches}
    whole = [layer for layer in layers if layer not in found and layer.d <= solver.dense_limit]
    diagonal = [layer for layer in layers if layer not in found and layer not in whole]
    updated = [layer for layer in found if solver.updated and found[layer].kind == "kronecker"]
    if whole or diagonal or updated:
        order = {layer: i for i, layer in enumerate(layers)}
        wanted = Wanted(
            tuple(order[layer] for layer in whole),
            tuple(order[layer] for layer in diagonal),
            {order[layer]: found[layer] for layer in updated},
        )
        sums, report = curvature.total(second_pass, wanted, dtype, solver.described)
        reports += [] if report is None else [report]
        totals = {layer: sums[i].to(curvature.device) for layer, i in order.items() if i in sums}
        for layer in updated:
            found[layer] = found[layer].with_values(totals[layer] / curvature.n)
        for layer in (*whole, *diagonal):
            if layer not in totals:
                zeros = torch.zeros(1, layer.d, dtype=torch.float64, device=curvature.device)
                found[layer] = KroneckerBlock("zero", False, None, None, zeros)
            elif layer in whole:
                found[layer] = dense_block(totals[layer] / curvature.n, dtype)
            else:
                found[layer] = KroneckerBlock("diagonal", False, None, None, totals[layer][None] / curvature.n)
    return [found[layer] for layer in layers], reports


def _candidates(layers: tuple[Layer, ...]) -> list[Layer]:
    """Layers whose gradients are sums of outer products."""
    return [layer for layer in layers if layer.route.kind == "outer" and layer.owner.weight is not None]


def _factor_sketches(
    curvature: OuterCurvature, layers: tuple[Layer, ...], solver: KroneckerSolver, dtype: torch.dtype
) -> dict[Layer, FactorSketch]:
    if not isinstance(solver.sketch, Kronecker):
        return {}
    own = block_sketches(solver.sketch, curvature.groups)
    like = torch.empty(0, dtype=dtype, device=curvature.device)
    found = {}
    for layer in _candidates(layers):
        matrix = next(m for m in curvature.rows.matrices(layer.group) if m.at == layer.stretches[0][2])
        P_E, P_A = own[layer.group].factors(matrix.at, matrix.rows, matrix.width, like)
        found[layer] = FactorSketch(P_E, P_A, matrix.bias)
    return found


def _covariances(
    curvature: OuterCurvature,
    layers: tuple[Layer, ...],
    solver: KroneckerSolver,
    sketches: Mapping[Layer, FactorSketch],
) -> tuple[dict[Layer, Covariances], Report | None]:
    """Of the layers that have factors in every batch, and small or sketched ones; and what their store did."""
    order = {layer: i for i, layer in enumerate(layers)}
    numbers = {order[layer]: sketches.get(layer) for layer in _candidates(layers)}
    found, report = curvature.total(first_pass, numbers, solver.factor_limit, solver.sharing, solver.described)
    return {layer: found[i].to(curvature.device) for layer, i in order.items() if found.get(i) is not None}, report


def _exported(tensors: dict[str, Tensor], layers: tuple[Layer, ...]) -> list[KroneckerBlock]:
    blocks = []
    for i in range(len(layers)):
        kind, bias = tensors[f"kind/{i}"].tolist()
        blocks.append(
            KroneckerBlock(
                KINDS[kind], bool(bias), tensors.get(f"rows/{i}"), tensors.get(f"columns/{i}"), tensors[f"values/{i}"]
            )
        )
    return blocks
