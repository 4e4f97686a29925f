"""Averages over independent sketches, with standard errors from their spread."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float
from torch import Tensor

from refluence.columns import ColumnSums
from refluence.curvature import Curvature, Vectors
from refluence.gradients.rows import GradientRows
from refluence.sketches import Sketch
from refluence.solvers.cost import Cost, Workload
from refluence.solvers.sketched_state import SketchedState
from refluence.solvers.state import Shifts, Solution, State
from refluence.theory import SpectralMeasure, implied_damping


def replicate_sketches(sketch: Sketch, replicates: int) -> list[Sketch]:
    """Independent sketches of the same kind; the first is the given one."""
    digests = [hashlib.sha256(f"{sketch.seed}:replicate {r}".encode()).digest() for r in range(1, replicates)]
    return [sketch, *(sketch.reseeded(int.from_bytes(digest[:7], "big")) for digest in digests)]


def exported_members(tensors: dict[str, Tensor], replicates: int) -> list[dict[str, Tensor]]:
    """What each member exported, from what the state did."""
    return [
        {name.removeprefix(f"{r}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{r}/")}
        for r in range(replicates)
    ]


def replicated_cost(one: Cost, w: Workload, replicates: int) -> Cost:
    """The cost of several sketches, from that of one: as many passes over the gradients where they cannot be kept."""
    if replicates == 1:
        return one
    kept = w.n * (w.bytes_per_row + w.feature_bytes_per_row)
    return Cost(replicates * one.fixed, kept, replicates * one.work, passes=float(replicates))


class ReplicatedState(State):
    """The mean of R independent sketched states.

    The variance of a mean score is estimated block by block as

        Var τ̄_ij = c · e_ij² / R,    c = mean_ij [S²_ij / e_ij²],

    with S²_ij the sample variance over the R sketches and e_ij² the mean over them of the first-order variance of a
    sketch with independent entries (`sketch_errors`): the formula gives the shape over the pairs, the spread its size.
    c is near 1 for such a sketch and for a tensor sketch, and several for a Kronecker sketch. A sum of columns has the
    formula's e of the sum and the c of the single pairs: few sums would say little about a c of their own.
    """

    independent_blocks = True
    knows_spectrum = True

    def __init__(self, curvature: Curvature, members: Sequence[SketchedState]) -> None:
        super().__init__(curvature)
        self.members = list(members)

    def export(self) -> dict[str, Tensor]:
        """What every member exports."""
        return {
            f"{r}/{name}": tensor for r, member in enumerate(self.members) for name, tensor in member.export().items()
        }

    def spectra(self) -> dict[str, SpectralMeasure]:
        """Block → the mean over the sketches of the largest eigenvalue, of the second largest, …"""
        found = [member.spectra() for member in self.members]
        return {
            block: replace(first, values=np.mean([np.sort(spectra[block].values) for spectra in found], axis=0))
            for block, first in found[0].items()
        }

    def effective_dimension(self, shifts: Shifts) -> float:
        """The mean of the members' effective dimensions."""
        return sum(member.effective_dimension(shifts) for member in self.members) / len(self.members)

    def targets(self, shifts: Shifts) -> Shifts:
        """Block → the mean κ whose exact scores the members estimate."""
        first = self.members[0]
        if first.corrected or not self.curvature.positive:
            return shifts
        return {
            block: sum(implied_damping(one.systems[block].eigenvalues, one.sketch.m, shift) for one in self.members)
            / len(self.members)
            for block, shift in shifts.items()
        }

    @property
    def traces(self) -> dict[str, float]:  # type: ignore[override]
        """Block → tr C_b, from the gradients themselves."""
        return self.members[0].traces

    def solve(self, vectors: Vectors, shifts: Shifts) -> Solution:
        """The mean of Pᵀ(PCPᵀ+μ)⁻¹PV."""
        found = [member.solve(vectors, shifts).values for member in self.members]
        return Solution({block: _mean([values[block] for values in found]) for block in vectors})

    def scores(self, tests: GradientRows, shifts: Shifts) -> Iterator[tuple[str, Float[Tensor, "k n"]]]:
        """Block → the mean of τ̃(v_i, w_j g_j)."""
        for parts in zip(*(member.scores(tests, shifts) for member in self.members), strict=True):
            yield parts[0][0], _mean([values for _, values in parts])

    def deviations(
        self, tests: GradientRows, shifts: Shifts, sums: ColumnSums | None = None
    ) -> Iterator[tuple[str, Float[Tensor, "k g"]]] | None:
        """Block → standard error of each mean score, or of sums of its columns."""
        return self._deviations(tests, shifts, sums) if self.curvature.positive else None

    def _deviations(
        self, tests: GradientRows, shifts: Shifts, sums: ColumnSums | None
    ) -> Iterator[tuple[str, Float[Tensor, "k g"]]]:
        scores = zip(*(member.scores(tests, shifts) for member in self.members), strict=True)
        formulas = zip(*(member.formula_errors(tests, shifts, None) for member in self.members), strict=True)
        for values, errors in zip(scores, formulas, strict=True):
            block = values[0][0]
            of_sums = None
            if sums is not None:
                of_sums = [_formula_of_sums(member, tests, block, shifts[block], sums) for member in self.members]
            yield block, spread_errors([part for _, part in values], [error for _, error in errors], of_sums)

    def self_influence(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """The mean of τ̃(g_j, w_j g_j)."""
        return _mean([member.self_influence(shifts) for member in self.members])

    def inverse_norms(self, shifts: Shifts) -> Float[Tensor, " n"]:
        """The mean of ‖(PCPᵀ+μI)⁻¹ w_j Pg_j‖²."""
        return _mean([member.inverse_norms(shifts) for member in self.members])


def spread_errors(
    scores: Sequence[Float[Tensor, "k n"]],
    formula: Sequence[Float[Tensor, "k n"]],
    of_sums: Sequence[Float[Tensor, "k g"]] | None = None,
) -> Float[Tensor, "k g"]:
    """√(c e_ij²/R), c = mean_ij [S²_ij/e_ij²], of R sketches' scores and first-order standard errors.

    One c for all pairs: each pair's own S² has R − 1 degrees of freedom, too few for an interval.

    Args:
        scores, formula: of every pair.
        of_sums: first-order standard errors of sums of the columns, whose errors are wanted; None: of the pairs.
    """
    R = len(scores)
    mean = _mean(scores)
    spread = _mean([(values - mean).square_() for values in scores]) * (R / (R - 1))
    shape = _mean([error.square() for error in formula])
    # A pair without a first-order error, of a zero gradient, has no spread either.
    known = shape > 0
    c = float((spread[known] / shape[known]).mean()) if bool(known.any()) else 0.0
    wanted = shape if of_sums is None else _mean([error.square() for error in of_sums])
    return wanted.mul_(c / R).sqrt_()


def _formula_of_sums(
    member: SketchedState, tests: GradientRows, block: str, shift: float, sums: ColumnSums
) -> Float[Tensor, "k g"]:
    [(_, errors)] = member.formula_errors(tests, {block: shift}, sums)
    return errors


def _mean(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total.div_(len(parts))
