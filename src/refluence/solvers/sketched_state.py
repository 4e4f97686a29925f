"""What `Sketched` keeps: projected train gradients, and the m×m or n×n matrix of the sketched curvature."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from refluence.columns import ColumnSums
from refluence.curvature import Curvature, Vectors
from refluence.gradients.rows import GradientRows
from refluence.sketches import Sketch
from refluence.solvers.projected import Projected, products, quadratic, sums_of_rows
from refluence.solvers.projection import curvature_sketches, project_rows
from refluence.solvers.psd import PositiveMatrix
from refluence.solvers.sketch_errors import has_error_formula, standard_errors
from refluence.solvers.state import Shifts, Solution, refuse_singular
from refluence.solvers.symmetric import SymmetricMatrix
from refluence.solvers.systems import MatrixState, root_weights, scale_rows, sum_over
from refluence.theory import SpectralMeasure, corrected_damping, implied_damping, sketch_variance_scale


class SketchedState(MatrixState):
    """Projected train gradients, and for each block a matrix with the non-zero eigenvalues of PCPᵀ."""

    independent_blocks = True

    def __init__(
        self,
        sketch: Sketch,
        corrected: bool,
        curvature: Curvature,
        matrices: dict[str, Tensor],
        projected: Projected,
    ) -> None:
        super().__init__(curvature, matrices)
        if not curvature.positive:
            self.systems = {block: SymmetricMatrix(matrix) for block, matrix in matrices.items()}
        self.sketch, self.corrected, self.projected = sketch, corrected, projected
        self.sketches = curvature_sketches(sketch, curvature)
        self._shifts: dict[tuple[str, float], float] = {}
        self._train: dict[str, tuple[float, Tensor]] = {}
        self._tests: WeakKeyDictionary[GradientRows, dict[str, Tensor]] = WeakKeyDictionary()

    def export(self) -> dict[str, Tensor]:
        """The matrices and the projected gradients."""
        return super().export() | {f"rows/{block}": rows for block, rows in self.projected.rows().items()}

    def shift(self, block: str, shift: float) -> float:
        """μ for the wanted κ: κ(1 − d/m) where corrected, else κ itself."""
        if not self.corrected:
            return shift
        if (block, shift) not in self._shifts:
            eigenvalues = self.systems[block].eigenvalues
            self._shifts[block, shift] = corrected_damping(eigenvalues, self.sketch.m, shift)
        return self._shifts[block, shift]

    def rank_needed(self, block: str) -> int:
        """The rank at which the sketched curvature is regular."""
        return self.sketch.m

    def spectra(self) -> dict[str, SpectralMeasure]:
        """Block → (eigenvalues of PCPᵀ, m where they are to be corrected)."""
        size = self.sketch.m if self.corrected else None
        return {b: SpectralMeasure(system.eigenvalues, sketch_size=size) for b, system in self.systems.items()}

    @cached_property
    def traces(self) -> dict[str, float]:
        """Block → tr C_b, from the gradients themselves and not from their sketch."""
        return self.curvature.traces()

    @property
    def has_errors(self) -> bool:
        """Whether the scores have standard errors."""
        return self.curvature.positive and has_error_formula(self.sketch)

    def target(self, block: str, shift: float) -> float:
        """The κ whose exact scores those at `shift` estimate."""
        if self.corrected or not self.has_errors:
            return shift
        if shift == 0:
            refuse_singular(self.systems[block].rank(), self.rank_needed(block), block)
        # `rf.theory.implied_damping`, which a Cholesky factor gives without the eigenvalues.
        system, m = self.systems[block], self.sketch.m
        return m / (system.inverse_trace(shift) + ((m - system.size) / shift if m > system.size else 0.0))

    def targets(self, shifts: Shifts) -> Shifts:
        """Block → the κ whose exact scores the scores estimate."""
        return {block: self.target(block, shift) for block, shift in shifts.items()}

    def deviations(
        self, tests: GradientRows, shifts: Shifts, sums: ColumnSums | None = None
    ) -> Iterator[tuple[str, Float[Tensor, "k g"]]] | None:
        """Block → standard error of each score, or of sums of its columns, about the exact one at κ (`sketch_errors`).

        A sum of columns is the score of the summed train gradients, so that its error has the same formula.
        """
        return self.formula_errors(tests, shifts, sums) if self.has_errors else None

    def formula_errors(
        self, tests: GradientRows, shifts: Shifts, sums: ColumnSums | None
    ) -> Iterator[tuple[str, Float[Tensor, "k g"]]]:
        """Block → the first-order standard errors, whether or not they hold for this kind of sketch."""
        projected = self.projected_tests(tests)
        for block, system, shift in self.systems_at(shifts):
            scale = sketch_variance_scale(system.eigenvalues, self.sketch.m, shift)
            cross, of_tests = self._squared_with_tests(block, shift, projected[block])
            if sums is not None:
                cross, of_train = sums.columns(cross), self._squared_sums(block, shift, sums)
            else:
                if block not in self._train or self._train[block][0] != shift:
                    self._train[block] = (shift, self._squared_train(block, shift))
                of_train = self._train[block][1]
            yield block, standard_errors(cross, of_tests, of_train, scale)

    @abstractmethod
    def _squared_with_tests(
        self, block: str, shift: float, tests: Float[Tensor, "k m"]
    ) -> tuple[Float[Tensor, "k n"], Float[Tensor, " k"]]:
        """(s(v_i, w_j g_j), s(v_i, v_i)) with s(v, g) = (Pv)ᵀ(PCPᵀ+μ)⁻²(Pg)."""

    def test_influence(self, tests: GradientRows, shifts: Shifts) -> Float[Tensor, " k"]:
        """τ̃(v_i, v_i), summed over blocks."""
        vectors = self.projected_tests(tests)
        return sum_over(
            self._test_influence(block, shift, vectors[block]) for block, _, shift in self.systems_at(shifts)
        )

    @abstractmethod
    def _test_influence(self, block: str, shift: float, tests: Float[Tensor, "k m"]) -> Float[Tensor, " k"]:
        """τ̃(v_i, v_i) of one block."""

    @abstractmethod
    def _squared_train(self, block: str, shift: float) -> Float[Tensor, " n"]:
        """s(w_j g_j, w_j g_j)."""

    @abstractmethod
    def _squared_sums(self, block: str, shift: float, sums: ColumnSums) -> Float[Tensor, " g"]:
        """The same of the sums Σ_j f_j w_j g_j."""

    def inverse_norms(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """‖(PCPᵀ+μI)⁻¹ w_j Pg_j‖²/κ', which estimates ‖(C+κI)⁻¹ w_j g_j‖² as −∂τ̃/∂μ = −κ'·∂τ/∂κ; κ' = dκ/dμ."""
        return sum_over(
            self._squared_train(block, shift) / self._slope(system, shift)
            for block, system, shift in self.systems_at(shifts)
        )

    def _slope(self, system: PositiveMatrix, shift: float) -> float:
        """κ' = κ²(1/m) Σ_j (σ̃_j+μ)⁻², or 1 where the scores are those of the sketch itself."""
        if not (self.corrected or self.has_errors):
            return 1.0
        m, eigenvalues = self.sketch.m, system.eigenvalues
        scale = sketch_variance_scale(eigenvalues, m, shift)
        return implied_damping(eigenvalues, m, shift) ** 2 / (m * scale)

    def projected_tests(self, tests: GradientRows) -> dict[str, Float[Tensor, "k m"]]:
        """Block → PV, projected once for all that is asked of the same tests."""
        if tests not in self._tests:
            self._tests[tests] = {b: rows.double() for b, rows in project_rows(tests, self.sketches).items()}
        return self._tests[tests]

    def _weighted(self, values: Float[Tensor, "... n"], power: int = 1) -> Float[Tensor, "... n"]:
        weights = self.curvature.weights
        return values if weights is None else values * weights.to(values) ** power


class SketchedPrimal(SketchedState):
    """Sketched scores through the m×m matrix."""

    def solve(self, vectors: Vectors, shifts: Shifts) -> Solution:
        """Pᵀ(PCPᵀ+μ)⁻¹PV, whose inner products with gradients are the sketched scores."""
        found = {}
        for block, system, shift in self.systems_at({block: shifts[block] for block in vectors}):
            sketch, v = self.sketches[block], vectors[block].double()
            found[block] = sketch.lift(system.solve(sketch.project(v.T).T, shift), v.shape[0])
        return Solution(found)

    def scores(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[str, Float[Tensor, "k n"]]]:
        """Block → τ̃(v_i, w_j g_j)."""
        vectors = self.projected_tests(tests)
        for block, system, shift in self.systems_at(shifts):
            solved = system.solve(vectors[block].T, shift)
            # The solve needs float64; its products with rows that were rounded to float32 gain nothing by it.
            yield block, self._weighted(self.projected.by_row(products, block, solved, None).to(solved).T)

    def _over_train(self, block: str, shift: float, squared: bool) -> Float[Tensor, " n"]:
        found = self.projected.by_row(quadratic, block, self.systems[block], shift, squared)
        return self._weighted(found.to(self.curvature.device), 2 if squared else 1)

    def self_influence(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """τ̃(g_j, w_j g_j)."""
        return sum_over(self._over_train(block, shift, squared=False) for block, _, shift in self.systems_at(shifts))

    def _test_influence(self, block: str, shift: float, tests: Float[Tensor, "k m"]) -> Float[Tensor, " k"]:
        return (self.systems[block].solve(tests.T, shift) * tests.T).sum(dim=0)

    def _squared_train(self, block: str, shift: float) -> Float[Tensor, " n"]:
        return self._over_train(block, shift, squared=True)

    def _squared_sums(self, block: str, shift: float, sums: ColumnSums) -> Float[Tensor, " g"]:
        rows = self.projected.total(sums_of_rows, block, sums).to(self.curvature.device)
        return self.systems[block].solve(rows.T, shift).square().sum(dim=0)

    def _squared_with_tests(
        self, block: str, shift: float, tests: Float[Tensor, "k m"]
    ) -> tuple[Float[Tensor, "k n"], Float[Tensor, " k"]]:
        system = self.systems[block]
        solved = system.solve(tests.T, shift)
        cross = self.projected.by_row(products, block, system.solve(solved, shift), torch.float64).to(solved)
        return scale_rows(cross, self.curvature.weights).T, solved.square().sum(dim=0)


class SketchedDual(SketchedState):
    """Sketched scores through the n×n Gram matrix of the projected gradients, where m > n."""

    @cached_property
    def _roots(self) -> Tensor | None:
        return root_weights(self.curvature.weights)

    def _rows(self, block: str) -> Float64[Tensor, "n m"]:
        return self.projected.rows()[block].to(device=self.curvature.device, dtype=torch.float64)

    def solve(self, vectors: Vectors, shifts: Shifts) -> Solution:
        """Pᵀ(PCPᵀ+μ)⁻¹PV by Woodbury."""
        found = {}
        for block, system, shift in self.systems_at({block: shifts[block] for block in vectors}):
            sketch, rows, v = self.sketches[block], self._rows(block), vectors[block].double()
            projected = sketch.project(v.T).T
            inner = scale_rows(system.solve(scale_rows(rows @ projected, self._roots), shift), self._roots)
            found[block] = sketch.lift((projected - rows.T @ inner / self.n) / shift, v.shape[0])
        return Solution(found)

    def scores(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[str, Float[Tensor, "k n"]]]:
        """Block → τ̃(v_i, w_j g_j)."""
        vectors = self.projected_tests(tests)
        for block, system, shift in self.systems_at(shifts):
            right = scale_rows(self._rows(block) @ vectors[block].T, self._roots)
            yield block, scale_rows(system.solve(right, shift), self._roots).T

    def self_influence(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """τ̃(g_j, w_j g_j)."""
        return self.n * sum_over(system.leverages(shift) for _, system, shift in self.systems_at(shifts))

    def _test_influence(self, block: str, shift: float, tests: Float[Tensor, "k m"]) -> Float[Tensor, " k"]:
        rows = self._rows(block)
        across = scale_rows(rows @ tests.T, self._roots)
        within = (across * self.systems[block].solve(across, shift)).sum(dim=0)
        return (tests.square().sum(dim=1) - within / self.n) / shift

    def _squared_train(self, block: str, shift: float) -> Float[Tensor, " n"]:
        # s(√w g, √w g) = n [(K+μ)⁻¹K(K+μ)⁻¹]_jj
        return self._weighted(self.n * self.systems[block].squared_leverages(shift))

    def _squared_sums(self, block: str, shift: float, sums: ColumnSums) -> Float[Tensor, " g"]:
        inner = self.systems[block].solve(scale_rows(sums.matrix.to(self.curvature.device), self._roots), shift)
        return self.n * (inner * (self.systems[block].matrix @ inner)).sum(dim=0).clamp(min=0.0)

    def _squared_with_tests(
        self, block: str, shift: float, tests: Float[Tensor, "k m"]
    ) -> tuple[Float[Tensor, "k n"], Float[Tensor, " k"]]:
        """By push-through √W R (RᵀWR/n+μ)⁻² = (K+μ)⁻² √W R, and by Woodbury (RᵀWR/n+μ)⁻¹z = (z − Rᵀ√W h/n)/μ.

        h = (K+μ)⁻¹√W R z. The norm is that of the difference as a vector, so that what cancels in it costs no more
        digits than a solve; ‖z‖² less a sum of squares would cost twice as many.
        """
        system, rows = self.systems[block], self._rows(block)
        inner = system.solve(scale_rows(rows @ tests.T, self._roots), shift)
        cross = scale_rows(system.solve(inner, shift), self._roots).T
        left = tests - scale_rows(inner, self._roots).T @ rows / self.n
        return cross, left.square_().sum(dim=1) / shift**2
