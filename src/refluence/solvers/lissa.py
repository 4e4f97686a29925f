"""Inverses by a Neumann series, on all examples or on random batches of them (LiSSA)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from refluence.curvature import Curvature, OuterCurvature, Vectors
from refluence.errors import PlanError, SolverError
from refluence.gradients.blocks import accumulation_dtype
from refluence.linalg import neumann_depth, neumann_solve, run_together
from refluence.linalg.lanczos import Ends, ends_steps
from refluence.linalg.neumann import ROUNDING, advice_for
from refluence.progress import track
from refluence.solvers.cost import Cost, Workload
from refluence.solvers.joint import JointSystem
from refluence.solvers.state import OperatorState, Shifts, Solution

SPECTRUM_STEPS = 50
SLACK = 100.0
"""How far a sampled recursion may pass the bound of an exact one before it counts as divergent."""
SINGULAR = 100.0
"""An eigenvalue below SINGULAR·ε of the largest is zero to rounding."""
DEEPEST = 100_000
ASSUMED_DEPTH = 1000
TOGETHER_BYTES = 256 << 20
"""Memory for the repeats that run side by side."""
FEW = 32
"""A share of the examples below 1/FEW is drawn one by one, and what came before drawn again."""
AHEAD = 256
"""Single rows that are drawn at once."""
UNRELATED = 1_000_003


@dataclass(frozen=True)
class Lissa:
    """s ← v + s − (C + μI)s/scale, `depth` times from s = v; (C + μI)⁻¹v ≈ s/scale. All right-hand sides together.

    Stops short: an eigenvalue σ of C + μI is left with a share (1 − σ/scale)^(depth+1) of its component missing, which
    is bias, not noise. With `batch_size` each step takes C of that many random examples, and the noise is averaged over
    `repeats`. `diagnostics` has the true residual ‖(C+μ)s − v‖/‖v‖, worst over right-hand sides, and its two parts:
    noise = its standard error over repeats, bias = what is left.
    Agarwal, Bullins & Hazan 2017 (arXiv 1602.03943); Koh & Liang 2017 (arXiv 1703.04730).

    Args:
        depth: steps; None: so that no component misses more than `tolerance` of itself, from σ_min ≥ μ (for the
            Hessian from the smallest Ritz value).
        scale: None: measured for each block, at least σ_max of C + μI; with batches σ_max + max_i tr C_i/batch_size + μ
            at least, at which the mean square of the error shrinks.
        repeats: recursions that are averaged, of the random batches.
        batch_size: examples of a step, drawn without replacement; None: all.
        tolerance: see depth.
        seed: of the batches.

    Raises:
        PlanError: settings that cannot be; in `prepare`, batches of a curvature that has no rows in memory.
        SolverError: in a solve, the recursion diverges (with the scale that works), C + μI is not positive, or the
            depth needed is above 100,000.
    """

    depth: int | None = None
    scale: float | None = None
    repeats: int = 1
    batch_size: int | None = None
    tolerance: float = 1e-2
    seed: int = 0

    iterative: ClassVar[bool] = True
    """Whether the solution is no fixed symmetric map of v, so that it cannot precondition."""

    def __post_init__(self) -> None:
        if self.depth is not None and self.depth < 0:
            raise PlanError(f"the depth of Lissa must be ≥ 0, not {self.depth}")
        if self.scale is not None and not self.scale > 0:
            raise PlanError(f"the scale of Lissa must be > 0, not {self.scale}")
        if self.repeats < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise PlanError(f"Lissa(repeats={self.repeats}, batch_size={self.batch_size}): both must be at least 1")
        if not 0 < self.tolerance < 1:
            raise PlanError(f"the tolerance of Lissa must lie in (0, 1), not {self.tolerance}")
        if self.repeats > 1 and self.batch_size is None:
            raise PlanError("repeats of Lissa without a batch_size are all the same: give a batch_size, or repeats=1")

    def prepare(self, curvature: Curvature) -> LissaState:
        """Measure the ends of the spectrum where scale or depth are left open."""
        state = LissaState(curvature, self, {}, {})
        if self.scale is None or self.depth is None:
            state.measure()
        return state

    def restore(self, curvature: Curvature, tensors: dict[str, Tensor]) -> LissaState:
        """The state of what `export` gave."""
        ends = {k.removeprefix("ends/"): Ends(*x.tolist()) for k, x in tensors.items() if k.startswith("ends/")}
        largest = {k.removeprefix("largest/"): float(x) for k, x in tensors.items() if k.startswith("largest/")}
        return LissaState(curvature, self, ends, largest)

    def cost(self, w: Workload) -> Cost:
        """`depth` products for each test; where it is left open, a thousand are counted."""
        depth = ASSUMED_DEPTH if self.depth is None else self.depth
        share = 1.0 if self.batch_size is None else min(1.0, self.batch_size / w.n)
        columns = w.itemsize * w.d * w.tests
        together = min(self.repeats * columns, max(columns, TOGETHER_BYTES))
        return Cost(
            fixed=4.0 * together + w.itemsize * SPECTRUM_STEPS * w.d + w.test_bytes + w.score_bytes,
            kept=w.n * (w.bytes_per_row + w.feature_bytes_per_row),
            work=(w.tests * (self.repeats * (depth * share + 1)) + SPECTRUM_STEPS) * w.product_work + w.dot_work,
            passes=float(self.repeats * (depth * share + 1) + SPECTRUM_STEPS + 1),
        )


class LissaState(OperatorState):
    """A solver with the ends of each block's spectrum, and the largest trace of an example's own curvature."""

    def __init__(self, curvature: Curvature, solver: Lissa, ends: dict[str, Ends], largest: dict[str, float]) -> None:
        super().__init__(curvature)
        self.solver, self.ends, self.largest = solver, ends, largest
        self.draw = curvature.sampled_each if self._batched else None

    @property
    def _batched(self) -> bool:
        return self.solver.batch_size is not None and self.solver.batch_size < self.n

    def measure(self) -> None:
        """Find the ends of every block's spectrum together, and the largest example for a batch."""
        if self.ends:
            return
        dtype, device = accumulation_dtype(self.curvature.dtype), self.curvature.device
        self.ends = run_together(
            {b: ends_steps(d, self.solver.seed, SPECTRUM_STEPS, dtype, device) for b, d in self.dimensions.items()},
            self.curvature.matvec,
        )
        if self.draw is not None and isinstance(self.curvature, OuterCurvature):
            self.largest = largest_examples(self.curvature)

    def export(self) -> dict[str, Tensor]:
        """What was measured."""
        tensors = {
            f"ends/{block}": torch.tensor([e.low, e.high, e.low_residual, e.margin], dtype=torch.float64)
            for block, e in self.ends.items()
        }
        tensors |= {f"largest/{b}": torch.tensor(x, dtype=torch.float64) for b, x in self.largest.items()}
        return tensors

    def scale(self, block: str, shift: float) -> float:
        """The scale in use, or by default the one that works."""
        return self.solver.scale if self.solver.scale is not None else self._working_scale(block, shift)

    def _working_scale(self, block: str, shift: float) -> float:
        ends = self.ends[block]
        top = ends.high + ends.margin + shift
        if not self._batched or self.solver.batch_size is None:
            return max(top, torch.finfo(torch.float64).tiny)
        # E[A_B²] ⪯ scale·A for A_B = C_B + μ, so that E‖(I − A_B/scale)x‖² ≤ xᵀ(I − A/scale)x.
        return top + shift + self.largest.get(block, top) / self.solver.batch_size

    def smallest(self, block: str, shift: float) -> float:
        """σ_min of C + μI: at least μ where C ⪰ 0, else from the smallest Ritz value.

        Raises:
            SolverError: C + μI is not positive.
        """
        ends = self.ends[block]
        if self.curvature.positive:
            found = (max(ends.low, 0.0) if ends.margin == 0 else 0.0) + shift
        else:
            # A Ritz value is never below the smallest eigenvalue; its residual says how near it is.
            found = max(ends.low + shift - ends.low_residual, 0.1 * (ends.low + shift))
        if not found > SINGULAR * torch.finfo(self.curvature.dtype).eps * (ends.high + shift):
            needed = -ends.low if ends.low < -SINGULAR * torch.finfo(self.curvature.dtype).eps * ends.high else 0.0
            raise SolverError(
                f"LiSSA needs curvature + damping to be positive, and in block {block!r} it has an eigenvalue of "
                f"{ends.low + shift:.3g} at damping {shift:.3g}: use a damping above {needed:.3g}"
                + ("" if self.curvature.positive else ", or a Fisher or GGN curvature")
            )
        return found

    def depth(self, shifts: Shifts) -> int:
        """The steps for these blocks."""
        if self.solver.depth is not None:
            return self.solver.depth
        depths = {
            b: neumann_depth(self.smallest(b, shift), self.scale(b, shift), self.solver.tolerance)
            for b, shift in shifts.items()
        }
        block = max(depths, key=lambda b: depths[b])
        if depths[block] > DEEPEST:
            raise SolverError(
                f"LiSSA needs {depths[block]} steps for a tolerance of {self.solver.tolerance:g} in block {block!r} "
                f"(smallest eigenvalue {self.smallest(block, shifts[block]):.3g}, scale "
                f"{self.scale(block, shifts[block]):.3g}): use a larger damping or tolerance, give the depth, or use "
                "solver ConjugateGradient"
            )
        return depths[block]

    def solve(self, vectors: Vectors, shifts: Shifts) -> Solution:
        """Block → s ≈ (C_b+μ_bI)⁻¹ V_b, and its true residual; products are in the dtype of the gradients."""
        shifts = {block: shifts[block] for block in vectors}
        dtype = accumulation_dtype(self.curvature.dtype)
        system = JointSystem(self.curvature, None, {block: v.shape[0] for block, v in vectors.items()}, shifts)
        right = system.join({block: v.to(dtype) for block, v in vectors.items()})
        depth = self.depth(shifts)
        scales = torch.cat(
            [right.new_full((v.shape[0], 1), self.scale(block, shifts[block])) for block, v in vectors.items()]
        )
        total, residuals = torch.zeros_like(right), []
        for repeats in torch.arange(self.solver.repeats).split(self._together(right)):
            found = self._recursion(system, right.T.repeat(len(repeats), 1).T, scales, depth, repeats.tolist())
            products = system.apply(found.div_(scales))
            residuals += [product - right for product in products.split(right.shape[1], dim=1)]
            total += found.unflatten(1, (len(repeats), -1)).sum(dim=1) / self.solver.repeats
        residual = self._report(residuals, right, depth, shifts)
        values = {block: part.to(vectors[block].dtype) for block, part in system.split(total).items()}
        iterations = torch.full(residual.shape, depth, dtype=torch.int64, device=residual.device)
        return Solution(values, residual, iterations, residual <= self.solver.tolerance)

    def _together(self, right: Float[Tensor, "d k"]) -> int:
        """How many repeats run side by side."""
        return max(1, TOGETHER_BYTES // max(1, right.numel() * right.element_size()))

    def _recursion(
        self,
        system: JointSystem,
        right: Float[Tensor, "d k"],
        scales: Float[Tensor, "d 1"],
        depth: int,
        repeats: list[int],
    ) -> Float[Tensor, "d k"]:
        """Of several repeats side by side, scaled block by block, so that the scale of all is 1."""
        product = self._product(system, repeats)

        def apply(vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
            return product(vectors).div_(scales)

        def remedy() -> str:
            self.measure()
            worst = max(
                system.shifts, key=lambda b: self._working_scale(b, system.shifts[b]) / self.scale(b, system.shifts[b])
            )
            shift = system.shifts[worst]
            return f"in block {worst!r}, " + advice_for(self.ends[worst].low + shift, self._working_scale(worst, shift))

        return neumann_solve(
            apply,
            right,
            1.0,
            depth,
            slack=SLACK if self._batched else 1.0 + ROUNDING,
            remedy=remedy,
            track=lambda steps: track(steps, "LiSSA", enabled=self.curvature.rows.progress),
            label=f"{float(scales.min()):.4g}",
        )

    def _product(self, system: JointSystem, repeats: list[int]) -> Callable[[Tensor], Tensor]:
        draw, size = self.draw, self.solver.batch_size
        if draw is None or size is None:
            return system.apply
        draws = [draws_of(self.n, size, self.solver.seed + UNRELATED * repeat) for repeat in repeats]

        def product(joint: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
            rows = torch.stack([next(own) for own in draws])
            vectors = system.split(joint)
            products = draw(rows.to(joint.device), vectors)
            return system.join({b: products[b].add_(v, alpha=system.shifts[b]) for b, v in vectors.items()})

        return product

    def _report(
        self, residuals: list[Tensor], right: Float[Tensor, "d k"], depth: int, shifts: Shifts
    ) -> Float[Tensor, " k"]:
        """The relative residual of the mean solution, with its parts in `diagnostics`."""
        repeats = len(residuals)
        norms = torch.linalg.vector_norm(right, dim=0, dtype=torch.float64)
        scale = torch.where(norms > 0, norms, 1.0)
        mean = torch.stack(residuals).mean(dim=0)
        residual = torch.linalg.vector_norm(mean, dim=0, dtype=torch.float64) / scale
        self.diagnostics["depth"] = depth
        self.diagnostics["scale"] = {block: self.scale(block, shift) for block, shift in shifts.items()}
        self.diagnostics["residual"] = float(residual.max())
        exact = not self._batched
        if exact or repeats > 1:
            spread = sum((r - mean).double().square().sum(dim=0) for r in residuals)
            noise = torch.as_tensor(spread, device=norms.device).sqrt() / max(1, repeats * (repeats - 1)) ** 0.5 / scale
            bias = (residual.square() - noise.square()).clamp(min=0.0).sqrt()
            self.diagnostics["residual_noise"] = 0.0 if exact else float(noise.max())
            self.diagnostics["residual_bias"] = float(bias.max())
        return residual


def draws_of(n: int, size: int, seed: int) -> Iterator[Int64[Tensor, " b"]]:
    """Batches of `size` of n rows at random, without end, no row twice in a batch.

    Where a batch is a small share of the rows a draw takes time for its own rows only.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    while True:
        if size == 1:
            yield from torch.randint(n, (AHEAD, 1), generator=generator)
        elif size * FEW > n:
            yield torch.randperm(n, generator=generator)[:size]
        else:
            rows: dict[int, None] = {}
            while len(rows) < size:
                rows |= dict.fromkeys(torch.randint(n, (size,), generator=generator).tolist())
            yield torch.tensor(list(rows)[:size])


def largest_examples(curvature: OuterCurvature) -> dict[str, float]:
    """Block → max_i w_i Σ_q ‖f_iq‖²."""
    return {block: float(norms.max()) for block, norms in curvature.by_row(_example_norms).items()}


def _example_norms(part: OuterCurvature) -> dict[str, Float[Tensor, " n"]]:
    """Block → w_i Σ_q ‖f_iq‖²."""
    found: dict[str, list[Tensor]] = {block: [] for block in part.groups}
    for start, blocks in part.features:
        for block, rows in blocks.items():
            norms = rows.squared_norms()
            weights = part.feature_weights(start, rows.n)
            norms = norms if weights is None else norms * weights.to(norms)
            found[block].append(norms.reshape(part.q, -1).sum(dim=0))
    return {block: torch.cat(parts) for block, parts in found.items()}
