"""Damping λ: by number, by ratio to the mean eigenvalue, by effective dimension, or by the library's rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import numpy as np
from scipy.optimize import brentq

from refluence.errors import RefluenceError, SketchSizeError
from refluence.theory import SpectralMeasure, corrected_damping, damping_for, effective_dimension

AUTO_SHARE = 16
AUTO_LIMIT = 2048


@dataclass(frozen=True)
class RelativeDamping:
    """λ = c · tr(C)/d: c times the mean eigenvalue, per block.

    Args:
        ratio: c > 0.
    """

    ratio: float

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise RefluenceError(f"RelativeDamping needs a ratio > 0, not {self.ratio!r}")
        object.__setattr__(self, "ratio", float(self.ratio))


@dataclass(frozen=True)
class EffectiveDimension:
    """The λ with effective dimension d_λ = tr C(C+(l2+λ)I)⁻¹ = k; over blocks, one λ with Σ_b d_λ(C_b) = k.

    Args:
        dimension: k > 0.
    """

    dimension: float

    def __post_init__(self) -> None:
        if not self.dimension > 0:
            raise RefluenceError(f"EffectiveDimension needs a dimension > 0, not {self.dimension!r}")
        object.__setattr__(self, "dimension", float(self.dimension))


Damping = float | RelativeDamping | EffectiveDimension | str


DampingChoice = Damping | Mapping[str, Damping]
"""One damping for all blocks, or one for each."""


@runtime_checkable
class DampedCurvature(Protocol):
    """What choosing a damping needs to know of a prepared curvature."""

    n: int
    dimensions: dict[str, int]

    @property
    def traces(self) -> dict[str, float]:
        """Block → tr C_b."""
        ...

    def spectra(self) -> dict[str, SpectralMeasure]:
        """Block → what is known of the eigenvalues of C_b."""
        ...


def check_damping(damping: DampingChoice, blocks: Sequence[str] | None = None) -> DampingChoice:
    """The damping, checked; a dict must name exactly the blocks.

    Raises:
        RefluenceError: a negative number, an unknown word or another type; a dict with unknown or missing blocks.
    """
    if isinstance(damping, (RelativeDamping, EffectiveDimension)) or (isinstance(damping, str) and damping == "auto"):
        return damping
    if isinstance(damping, Mapping):
        known = list(blocks) if blocks is not None else list(damping)
        if wrong := [block for block in damping if block not in known]:
            raise RefluenceError(f"damping names the blocks {wrong}, which do not exist: the blocks are {known}")
        if missing := [block for block in known if block not in damping]:
            raise RefluenceError(f"damping gives no value for the blocks {missing}: give every block one")
        if nested := [block for block, value in damping.items() if isinstance(value, Mapping)]:
            raise RefluenceError(f"the damping of block {nested[0]!r} is a dict: give a number or a rule")
        return {block: check_damping(value) for block, value in damping.items()}  # type: ignore[misc]
    if isinstance(damping, Real) and not isinstance(damping, bool) and 0 <= float(damping) < np.inf:
        return float(damping)
    raise RefluenceError(
        f'damping must be a number ≥ 0, rf.RelativeDamping(c), rf.EffectiveDimension(k), "auto", or a dict of these by '
        f"block, not {damping!r}"
    )


def auto_dimension(n: int, d: int) -> float:
    """The effective dimension that `damping="auto"` aims at."""
    return min(n / AUTO_SHARE, d / AUTO_SHARE, AUTO_LIMIT)


def resolve(damping: DampingChoice, curvature: DampedCurvature, l2: float) -> dict[str, float]:
    """λ of every block, l2 not included.

    "auto" is EffectiveDimension(min(n/16, d/16, 2048)), whatever the solver. In a dict the rules hold for the block
    alone: d_λ(C_b) = k, with "auto" from the block's own d.

    Raises:
        RefluenceError: an effective dimension that no λ ≥ 0 gives.
    """
    damping = check_damping(damping, list(curvature.dimensions))
    if isinstance(damping, Mapping):
        return {
            block: _resolve_one(damping[block], _Single(curvature, block), l2)[block] for block in curvature.dimensions
        }
    return _resolve_one(damping, curvature, l2)


@dataclass(frozen=True)
class _Single:
    """One block of a curvature."""

    whole: DampedCurvature
    block: str

    @property
    def n(self) -> int:
        return self.whole.n

    @property
    def dimensions(self) -> dict[str, int]:
        return {self.block: self.whole.dimensions[self.block]}

    @property
    def traces(self) -> dict[str, float]:
        return {self.block: self.whole.traces[self.block]}

    def spectra(self) -> dict[str, SpectralMeasure]:
        return {self.block: self.whole.spectra()[self.block]}


def _resolve_one(damping: Damping, curvature: DampedCurvature | _Single, l2: float) -> dict[str, float]:
    blocks = curvature.dimensions
    if isinstance(damping, float):
        return dict.fromkeys(blocks, damping)
    if isinstance(damping, RelativeDamping):
        for block, trace in curvature.traces.items():
            if not trace > 0:
                raise RefluenceError(
                    f"RelativeDamping needs a positive trace, and that of block {block!r} is {trace:.3g}: give the "
                    'damping as a number, or use the curvature "ggn" or "fisher"'
                )
        return {block: damping.ratio * trace / blocks[block] for block, trace in curvature.traces.items()}
    if isinstance(damping, EffectiveDimension):
        total = _shift_for(damping.dimension, curvature)
        if total < l2:
            raise RefluenceError(
                f"no damping ≥ 0 gives an effective dimension of {damping.dimension:g}: the task's l2 = {l2:g} alone "
                "leaves less. Ask for a smaller dimension"
            )
        return dict.fromkeys(blocks, total - l2)
    total = _shift_for(auto_dimension(curvature.n, sum(blocks.values())), curvature)
    return dict.fromkeys(blocks, max(0.0, total - l2))


def choice_record(damping: DampingChoice) -> Any:
    """A choice of damping as JSON-able values."""
    if isinstance(damping, Mapping):
        return {block: choice_record(value) for block, value in damping.items()}
    return damping if isinstance(damping, (float, str)) else {type(damping).__name__: asdict(damping)}


def common(by_block: Mapping[str, float]) -> float | dict[str, float]:
    """One number where all blocks have the same."""
    return next(iter(by_block.values())) if len(set(by_block.values())) == 1 else dict(by_block)


def _shift_for(dimension: float, curvature: DampedCurvature | _Single) -> float:
    """The κ = l2 + λ with Σ_b d_κ(C_b) = `dimension`; sketched spectra are corrected for the sketch's own damping."""
    spectra = {block: measure.positive_part() for block, measure in curvature.spectra().items()}
    sizes = {measure.sketch_size for measure in spectra.values()}
    if sizes == {None}:
        values = np.concatenate([measure.values for measure in spectra.values()])
        return damping_for(values, dimension, np.concatenate([measure.counts for measure in spectra.values()]))
    if len(spectra) == 1:
        [measure] = spectra.values()
        size = measure.sketch_size
        assert size is not None
        if dimension >= size:
            raise SketchSizeError(
                f"a sketch of m = {size} rows cannot hold an effective dimension of {dimension:g}: use a sketch of at "
                f"least {int(2 * dimension)} rows, or a larger damping"
            )
        damping = damping_for(measure.values, dimension)
        return damping / (1.0 - effective_dimension(measure.values, damping) / size)
    return _shift_over_blocks(dimension, spectra)


def _shift_over_blocks(dimension: float, spectra: dict[str, SpectralMeasure]) -> float:
    def excess(log_shift: float) -> float:
        shift, total = float(np.exp(log_shift)), 0.0
        for measure in spectra.values():
            size = measure.sketch_size
            try:
                own = shift if size is None else corrected_damping(measure.values, size, shift)
            except RefluenceError:
                own = 0.0
            total += effective_dimension(measure.values, own, measure.counts)
        return total - dimension

    top = max(float(measure.values.max()) for measure in spectra.values())
    count = sum(measure.counts.sum() for measure in spectra.values())
    low, high = np.log(top) - 60.0, np.log(top * count / dimension) + 1.0
    if excess(low) <= 0:
        raise RefluenceError(f"no damping gives an effective dimension of {dimension:g}: it is above the rank")
    return float(np.exp(brentq(excess, low, high, xtol=1e-13, rtol=1e-13)))
