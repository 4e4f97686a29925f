"""The ways of computing leverage: each takes the rows and the λ wanted, and gives the scores."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from refluence import damping as dampings
from refluence.damping import EffectiveDimension, RelativeDamping
from refluence.errors import RefluenceError
from refluence.leverage import deflation, dual, gram, recursive, sketch, triangle
from refluence.leverage.approximate import measured_error, projected_lengths
from refluence.leverage.examples import Examples
from refluence.leverage.forms import squared_lengths, trapezoid
from refluence.leverage.scores import LeverageScores, RankGap
from refluence.sketches.base import ColumnSketch
from refluence.solvers.psd import PositiveMatrix
from refluence.theory import SpectralMeasure, corrected_damping, effective_dimension
from refluence.theory.spectrum import EPSILON

SQUARABLE = (1e-200, 1e200)
"""Traces of XᵀX/n in which no square has overflowed or been lost."""
ROUNDING = 1e-9
"""Relative rounding error that "auto" allows the Gram matrix."""

Ridge = float | RelativeDamping | EffectiveDimension

BLOCK = "X"


@dataclass(frozen=True, eq=False)
class Wanted:
    """The rows, the λ asked for, where the rank is to be cut, and what random methods are told."""

    examples: Examples
    ridge: Ridge
    rtol: float | None
    sketch: ColumnSketch | None = None
    accuracy: float = 0.25
    seed: int = 0

    @property
    def plain(self) -> bool:
        """Whether λ = 0 was asked for."""
        return self.ridge == 0

    def damping(self, eigenvalues: Callable[[], np.ndarray], trace: float, sketch_size: int | None = None) -> float:
        """λ, from the eigenvalues of XᵀX/n, or of what a sketch of so many rows made of it."""
        moment = _Moment(self.examples.n, {BLOCK: self.examples.d}, trace, eigenvalues, sketch_size)
        return dampings.resolve(self.ridge, moment, 0.0)[BLOCK]

    def plain_scores(self, values: Tensor, method: str, rank: int, gap: RankGap | None) -> LeverageScores:
        """Scores at λ = 0, with a warning where no gap sets the rank apart."""
        warn_of_rank(rank, gap, self.examples)
        return LeverageScores(values, float(rank), 0.0, method, rank, gap)

    def zero(self, method: str) -> LeverageScores:
        """Scores of a matrix of rank 0."""
        values = self.examples.intercept() * 0
        return LeverageScores(values, 0.0, 0.0, method, 0 if self.plain else None)


@dataclass(eq=False)
class _Moment:
    """XᵀX/n, as far as choosing λ needs it."""

    n: int
    dimensions: dict[str, int]
    trace: float
    eigenvalues: Callable[[], np.ndarray]
    sketch_size: int | None

    @property
    def traces(self) -> dict[str, float]:
        return {BLOCK: self.trace}

    @cached_property
    def _measure(self) -> SpectralMeasure:
        return SpectralMeasure(self.eigenvalues(), sketch_size=self.sketch_size)

    def spectra(self) -> dict[str, SpectralMeasure]:
        return {BLOCK: self._measure}


def _exact(wanted: Wanted) -> LeverageScores:
    examples, n = wanted.examples, wanted.examples.n
    spectrum = triangle.singular_values(examples)
    rank, gap = triangle.cut(spectrum, n, examples.d, wanted.rtol)
    if rank == 0:
        return wanted.zero("exact")
    if wanted.plain:
        return wanted.plain_scores(triangle.plain_leverage(examples, spectrum, rank), "exact", rank, gap)
    squares = (spectrum.sigma.square() / n).cpu().numpy()
    damping = wanted.damping(lambda: squares, float(squares.sum()))
    values = triangle.ridge_leverage(examples, spectrum, rank, damping)
    return LeverageScores(values, float(values.sum()), damping, "exact")


def _gram(wanted: Wanted) -> LeverageScores:
    return _from_gram(wanted, gram.second_moment(wanted.examples))


def _from_gram(wanted: Wanted, system: PositiveMatrix, settled: bool = False) -> LeverageScores:
    """Scores from C; `settled`: no singular value is near its rounding, so that the rank is cut as from X itself."""
    examples, trace = wanted.examples, float(system.matrix.trace())
    if trace == 0:
        return wanted.zero("gram")
    if not trace < np.inf:
        raise RefluenceError(f'the squares of {examples.matrix.name} overflow: scale it down, or use method="exact"')
    if wanted.plain:
        relative = max(examples.n, examples.d) * EPSILON if settled else None
        rank, gap = gram.gram_cut(system, examples, wanted.rtol, relative)
        scores = wanted.plain_scores(gram.plain_leverage(examples, system, rank), "gram", rank, gap)
        return replace(scores, relative_error=gram.plain_rounding(system, rank))
    damping = wanted.damping(lambda: system.eigenvalues, trace)
    values = gram.ridge_leverage(examples, system, damping)
    return LeverageScores(
        values, float(values.sum()), damping, "gram", relative_error=gram.ridge_rounding(system, damping)
    )


def _dual(wanted: Wanted) -> LeverageScores:
    examples, n = wanted.examples, wanted.examples.n
    rows = dual.all_rows(examples)
    if wanted.plain:
        spectrum = dual.left_vectors(rows, examples)
        rank, gap = triangle.cut(spectrum, n, examples.d, wanted.rtol)
        if rank == 0:
            return wanted.zero("dual")
        values = spectrum.V[:, :rank].square().sum(dim=1).clamp_(max=1)
        return wanted.plain_scores(values, "dual", rank, gap)
    system = dual.dual_moment(rows, n)
    trace = float(system.matrix.trace())
    if trace == 0:
        return wanted.zero("dual")
    damping = wanted.damping(lambda: system.eigenvalues, trace)
    values = system.leverages(damping).clamp_(max=1)
    return LeverageScores(values, float(values.sum()), damping, "dual")


def _auto(wanted: Wanted) -> LeverageScores:
    examples = wanted.examples
    if examples.n < examples.d:
        return _dual(wanted)
    system = gram.second_moment(examples)
    trace = float(system.matrix.trace())
    if not SQUARABLE[0] < trace < SQUARABLE[1]:
        return _exact(wanted)
    if _digits_suffice(wanted, system, trace):
        return _from_gram(wanted, system, settled=True)
    if isinstance(wanted.ridge, EffectiveDimension):
        return _exact(wanted)  # the small eigenvalues decide λ, and only the triangular factor shows them
    damping = wanted.damping(lambda: system.eigenvalues, trace)
    basis = deflation.deflated_basis(examples, system, examples.n * damping, wanted.rtol)
    if basis.rank == 0:
        return wanted.zero("deflated")
    values = squared_lengths(examples, trapezoid(basis.W), "leverage").clamp_(max=1)
    if wanted.plain:
        return wanted.plain_scores(values, "deflated", basis.rank, basis.gap)
    return LeverageScores(values, float(values.sum()), damping, "deflated")


def _digits_suffice(wanted: Wanted, system: PositiveMatrix, trace: float) -> bool:
    """Whether the rounding of the Gram matrix, ε tr C, is small beside what it is inverted at."""
    if wanted.plain:
        rank, _ = gram.gram_cut(system, wanted.examples, wanted.rtol)
        return rank == system.size and gram.plain_rounding(system, rank) < ROUNDING
    least = trace * EPSILON / ROUNDING
    if isinstance(wanted.ridge, EffectiveDimension):
        return effective_dimension(system.eigenvalues, least) > wanted.ridge.dimension
    return wanted.damping(lambda: system.eigenvalues, trace) > least


def _sketched(wanted: Wanted) -> LeverageScores:
    """W from the singular vectors of SX; the bias of the inverse is taken off as from a sketched curvature."""
    examples, n = wanted.examples, wanted.examples.n
    chosen = wanted.sketch or sketch.default_sketch(examples.d, wanted.accuracy, wanted.seed)
    spectrum = triangle.of_matrix(sketch.sketched_rows(examples, chosen), examples)
    rank, gap = triangle.cut(spectrum, n, examples.d, wanted.rtol)
    if rank == 0:
        return wanted.zero("sketch")
    sigma, V, m = spectrum.sigma[:rank], spectrum.V[:, :rank], chosen.m
    if wanted.plain:
        damping, own, share = 0.0, 0.0, 1 - rank / m
    else:
        squares = (sigma.square() / n).cpu().numpy()
        damping = wanted.damping(lambda: squares, float(squares.sum()), m)
        own = corrected_damping(squares, m, damping)
        share = own / damping
    W = V * (share / (sigma.square() + n * own)).sqrt()
    values = projected_lengths(examples, W, wanted.accuracy, wanted.seed).clamp_(max=1)
    error = measured_error(examples, values, n * damping, lambda R: W @ (W.T @ R), wanted.seed)
    if wanted.plain:
        return replace(wanted.plain_scores(values, "sketch", rank, gap), relative_error=error)
    return LeverageScores(values, float(values.sum()), damping, "sketch", relative_error=error)


def _recursive(wanted: Wanted) -> LeverageScores:
    examples, n = wanted.examples, wanted.examples.n
    if wanted.plain or isinstance(wanted.ridge, EffectiveDimension):
        raise RefluenceError(
            'method "recursive" draws rows by their ridge leverage and needs λ before it begins: give ridge as a '
            'number or rf.RelativeDamping(c), or use method="sketch"'
        )
    trace = sum(float(rows.square().sum()) for rows in examples.reduced("trace")) / n
    if trace == 0:
        return wanted.zero("recursive")
    damping = wanted.damping(lambda: np.zeros(1), trace)
    drawn = recursive.drawn_rows(examples, n * damping, wanted.accuracy, wanted.seed)
    values = drawn.all_forms(examples).clamp_(max=1)
    error = measured_error(examples, values, n * damping, drawn.inverse, wanted.seed)
    return LeverageScores(values, float(values.sum()), damping, "recursive", relative_error=error)


WAYS: dict[str, Callable[[Wanted], LeverageScores]] = {
    "auto": _auto,
    "exact": _exact,
    "gram": _gram,
    "dual": _dual,
    "sketch": _sketched,
    "recursive": _recursive,
}
"""Method → scores."""


def warn_of_rank(rank: int, gap: RankGap | None, examples: Examples) -> None:
    """A warning where the rank could as well be another."""
    if gap is not None and not gap.clear:
        warnings.warn(
            f"the rank {rank} of {examples.matrix.name} is not certain: the smallest singular value that counts, "
            f"{gap.kept:.3g}, is only {gap.ratio:.3g} times as large as "
            + ("the largest that does not" if gap.dropped else "the cut")
            + ". Give a ridge, for scores that do not depend on where the cut lies, or rtol=",
            stacklevel=4,
        )
