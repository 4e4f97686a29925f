"""A curvature known by some of its eigenpairs: (C + μI)⁻¹ with U diag(s) Uᵀ in the place of C."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from refluence.curvature import Curvature, OuterCurvature, Vectors
from refluence.errors import PlanError, SolverError
from refluence.gradients.kernels import cross_grams
from refluence.gradients.rows import GradientRows
from refluence.solvers.cost import Cost, Workload
from refluence.solvers.state import OperatorState, Shifts, Solution, products_with
from refluence.theory import SpectralMeasure

ROUNDING = 100.0
"""s + μ below ROUNDING·ε·max|s| is zero to rounding, ε that of the eigenvectors' dtype."""


@dataclass(frozen=True)
class Eigenpairs:
    """Orthonormal vectors U, values s in float64, and the residuals ‖Cu − su‖ where they were measured."""

    vectors: Float[Tensor, "d r"]
    values: Float64[Tensor, " r"]
    residuals: Float64[Tensor, " r"] | None = None

    @property
    def full(self) -> bool:
        """Whether there is nothing beside the pairs."""
        return self.vectors.shape[1] == self.vectors.shape[0]


class LowRankState(OperatorState):
    """(C+μ)⁻¹ ≈ U diag(1/(s+μ)) Uᵀ + (I − UUᵀ)/μ, or without its second term.

    The first is Woodbury's inverse of U diag(s) Uᵀ + μI: what lies outside the span of U is damped, not dropped. Scores
    are (1/μ)[V Gᵀ − (VU) diag(s/(s+μ)) (GU)ᵀ], with V Gᵀ from the Gram products of the gradient blocks.

    Where s + μ < 0 (a Hessian with a negative eigenvalue) the pair is used as it is, counted in `diagnostics`, with a
    warning; where s + μ is 0 to rounding there is no inverse.

    Args:
        pairs: block → U and s.
        complement: whether the second term is kept.
    """

    def __init__(self, curvature: Curvature, pairs: Mapping[str, Eigenpairs], complement: bool = True) -> None:
        super().__init__(curvature)
        self.pairs, self.complement = dict(pairs), complement
        self.exact = all(pair.full for pair in self.pairs.values())
        self._warned: set[tuple[str, float]] = set()
        self._describe()

    def _describe(self) -> None:
        pairs = self.pairs
        self.diagnostics["rank"] = {block: pair.values.numel() for block, pair in pairs.items()}
        self.diagnostics["negative_eigenvalues"] = {
            block: int((pair.values < -_rounding(pair)).sum()) for block, pair in pairs.items()
        }
        measured = {block: p.residuals for block, p in pairs.items() if p.residuals is not None}
        if measured:
            self.diagnostics["largest_ritz_residual"] = {b: float(r.max()) for b, r in measured.items()}
        if isinstance(self.curvature, OuterCurvature):
            # Elsewhere the trace costs far more than a pass over the rows.
            self.diagnostics["captured_trace"] = {
                block: float(pair.values.sum()) / self.traces[block] if self.traces[block] > 0 else 1.0
                for block, pair in pairs.items()
            }

    def export(self) -> dict[str, Tensor]:
        """U, s and the residuals of every block."""
        tensors = {}
        for block, pair in self.pairs.items():
            tensors[f"vectors/{block}"], tensors[f"values/{block}"] = pair.vectors, pair.values
            if pair.residuals is not None:
                tensors[f"residuals/{block}"] = pair.residuals
        return tensors

    @property
    def knows_spectrum(self) -> bool:
        """Whether all eigenvalues are known, here or of the curvature."""
        return self.exact or super().knows_spectrum

    def spectra(self) -> dict[str, SpectralMeasure]:
        """Block → the eigenvalues where all are known, else the curvature's own estimate."""
        if not self.exact:
            return super().spectra()
        return {block: SpectralMeasure(pair.values.cpu().numpy()) for block, pair in self.pairs.items()}

    def _inverses(self, block: str, shift: float) -> Float64[Tensor, " r"]:
        """1/(s+μ)."""
        pair = self.pairs[block]
        values = pair.values
        if shift == 0 and self.complement and not pair.full:
            raise PlanError(
                f"a rank of {values.numel()} leaves {pair.vectors.shape[0] - values.numel()} directions of block "
                f"{block!r} without curvature, so there is no inverse at damping 0: use a damping > 0"
            )
        shifted = values + shift
        if bool((shifted.abs() <= _rounding(pair)).any()):
            nearest = float(values[shifted.abs().argmin()])
            raise SolverError(
                f"block {block!r} has the eigenvalue {nearest:.6g}, so curvature + damping is singular at damping "
                f"{shift:.6g}: use another damping"
            )
        negative = int((shifted < 0).sum())
        if negative:
            self.diagnostics.setdefault("negative_shifted", {})[block] = negative
            if (block, shift) not in self._warned:
                self._warned.add((block, shift))
                warnings.warn(
                    f"curvature + damping {shift:.3g} has {negative} negative eigenvalues in block {block!r}, the "
                    f"lowest {float(shifted.min()):.3g}; they are used as they are: use a larger damping, or a Fisher "
                    "or GGN curvature",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return 1.0 / shifted

    def _coefficients(self, block: str, shift: float) -> tuple[float, Float64[Tensor, " r"]]:
        """(a, c) with (C+μ)⁻¹ ≈ a·I + U diag(c) Uᵀ."""
        inverses = self._inverses(block, shift)
        if self.complement and not self.pairs[block].full:
            # Not 1/(s+μ) − 1/μ, which cancels for s ≪ μ.
            return 1.0 / shift, -self.pairs[block].values * inverses / shift
        return 0.0, inverses

    def solve(self, vectors: Vectors, shifts: Shifts) -> Solution:
        """Block → (C_b+μ_bI)⁻¹ V_b; the products with U are in the dtype of U."""
        values = {}
        for block, v in vectors.items():
            outside, inside = self._coefficients(block, shifts[block])
            basis = self.pairs[block].vectors
            weights = (v.T.to(basis.dtype) @ basis) * inside.to(basis.dtype)
            values[block] = (v.T * outside).add_(weights @ basis.T).T
        return Solution(values)

    @cached_property
    def _train_coordinates(self) -> dict[str, Float64[Tensor, "n r"]]:
        """Block → GU."""
        return self._coordinates(self.curvature.rows)

    def _coordinates(self, rows: GradientRows) -> dict[str, Float64[Tensor, "n r"]]:
        bases = {block: pair.vectors for block, pair in self.pairs.items()}
        return {block: x.T for block, x in products_with(rows, bases, self.product_dtype).items()}

    @cached_property
    def _outside_norms(self) -> dict[str, Float64[Tensor, " n"]]:
        """Block → ‖g − UUᵀg‖²."""
        norms = self.curvature.rows.squared_norms()
        return {
            b: (norms[b].to(x.device) - x.square().sum(dim=1)).clamp_(min=0.0)
            for b, x in self._train_coordinates.items()
        }

    def scores(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[str, Float[Tensor, "k n"]]]:
        """Block → τ(v_i, w_j g_j)."""
        coefficients = {block: self._coefficients(block, shifts[block]) for block in self.pairs}
        needed = any(outside for outside, _ in coefficients.values())
        across = cross_grams(self.curvature.rows, tests) if needed else {}
        coordinates = self._coordinates(tests)
        for block, (outside, inside) in coefficients.items():
            products = (self._train_coordinates[block] * inside) @ coordinates.pop(block).T
            if outside:
                products.add_(across.pop(block), alpha=outside)
            if self.curvature.weights is not None:
                products *= self.curvature.weights.to(products)[:, None]
            yield block, products.T

    def self_influence(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """τ(g_j, w_j g_j)."""
        return self._over_pairs(shifts, power=1)

    def inverse_norms(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """‖(C+μI)⁻¹ w_j g_j‖²."""
        return self._over_pairs(shifts, power=2)

    def _over_pairs(self, shifts: Shifts, power: int) -> Float[Tensor, " n"]:
        """w_j^power Σ_b (g_jᵀU)² (s+μ)^−power + ‖g_j − UUᵀg_j‖² μ^−power."""
        total = torch.zeros(self.n, dtype=torch.float64, device=self.curvature.device)
        for block, pair in self.pairs.items():
            total += self._train_coordinates[block].square() @ self._inverses(block, shifts[block]) ** power
            if self.complement and not pair.full:
                total += self._outside_norms[block] / shifts[block] ** power
        return total if self.curvature.weights is None else total * self.curvature.weights.to(total) ** power


def _rounding(pair: Eigenpairs) -> float:
    """What an eigenvalue that is zero may be found to be."""
    return ROUNDING * torch.finfo(pair.vectors.dtype).eps * float(pair.values.abs().max())


def exported_pairs(tensors: Mapping[str, Tensor]) -> dict[str, Eigenpairs]:
    """Block → eigenpairs, from what `export` gave."""
    blocks = [name.removeprefix("vectors/") for name in tensors if name.startswith("vectors/")]
    return {
        b: Eigenpairs(tensors[f"vectors/{b}"], tensors[f"values/{b}"], tensors.get(f"residuals/{b}")) for b in blocks
    }


def refuse_rank(rank: int, solver: str) -> None:
    """An error for a rank below 1."""
    if rank < 1:
        raise PlanError(f"{solver} needs a rank of at least 1, not {rank}")


def low_rank_cost(w: Workload, rank: int, columns: int, vectors: int, passes: float) -> Cost:
    """Of `columns` products that are orthogonalised against each other, `vectors` kept of each block's length."""
    per_block = {block: min(rank, d) for block, d in w.dimensions.items()}
    coordinates = (w.n + w.tests) * sum(per_block.values())
    return Cost(
        fixed=float(w.itemsize * vectors * w.d + 8 * coordinates) + 1.5 * w.score_bytes,
        kept=w.n * (w.bytes_per_row + w.feature_bytes_per_row),
        work=columns * w.product_work
        + 4.0 * columns * min(columns, vectors) * w.d
        + (w.n + w.tests) * sum(r * w.dimensions[block] for block, r in per_block.items())
        + w.n * w.tests * (w.inner_product_work + sum(per_block.values())),
        passes=passes + 2.0,
    )
