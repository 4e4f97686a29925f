"""Damping λ: by number, by ratio to the mean eigenvalue, by effective dimension, or by the library's rule."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from refluence.errors import RefluenceError
from refluence.theory import damping_for, effective_dimension

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


@runtime_checkable
class DampedCurvature(Protocol):
    """What choosing a damping needs to know of a prepared curvature."""

    n: int
    traces: dict[str, float]
    dimensions: dict[str, int]

    def spectra(self) -> dict[str, tuple[NDArray[np.float64], int | None]]:
        """Block → (eigenvalues, sketch size where they are those of a sketch to be corrected for)."""
        ...


def check_damping(damping: Damping) -> Damping:
    """The damping, checked.

    Raises:
        RefluenceError: a negative number, an unknown word or another type.
    """
    if isinstance(damping, (RelativeDamping, EffectiveDimension)) or damping == "auto":
        return damping
    if isinstance(damping, Real) and not isinstance(damping, bool) and 0 <= float(damping) < np.inf:
        return float(damping)
    raise RefluenceError(
        f'damping must be a number ≥ 0, rf.RelativeDamping(c), rf.EffectiveDimension(k) or "auto", not {damping!r}'
    )


def auto_dimension(n: int, d: int) -> float:
    """The effective dimension that `damping="auto"` aims at."""
    return min(n / AUTO_SHARE, d / AUTO_SHARE, AUTO_LIMIT)


def resolve(damping: Damping, curvature: DampedCurvature, l2: float) -> dict[str, float]:
    """λ of every block, l2 not included.

    "auto" is EffectiveDimension(min(n/16, d/16, 2048)), whatever the solver.

    Raises:
        RefluenceError: an effective dimension that no λ ≥ 0 gives.
    """
    damping = check_damping(damping)
    if isinstance(damping, float):
        return dict.fromkeys(curvature.traces, damping)
    if isinstance(damping, RelativeDamping):
        return {b: damping.ratio * trace / curvature.dimensions[b] for b, trace in curvature.traces.items()}
    if isinstance(damping, str):
        total = _shift_for(auto_dimension(curvature.n, sum(curvature.dimensions.values())), curvature)
        return dict.fromkeys(curvature.traces, max(0.0, total - l2))
    total = _shift_for(damping.dimension, curvature)
    if total < l2:
        raise RefluenceError(
            f"no damping ≥ 0 gives an effective dimension of {damping.dimension:g}: the task's l2 = {l2:g} alone "
            "leaves less. Ask for a smaller dimension"
        )
    return dict.fromkeys(curvature.traces, total - l2)


def _shift_for(dimension: float, curvature: DampedCurvature) -> float:
    """The κ = l2 + λ with Σ_b d_κ(C_b) = `dimension`; sketched spectra are corrected for the sketch's own damping."""
    spectra = curvature.spectra()
    sizes = {size for _, size in spectra.values()}
    if sizes == {None}:
        return damping_for(np.concatenate([values for values, _ in spectra.values()]), dimension)
    if len(spectra) == 1:
        [(values, size)] = spectra.values()
        assert size is not None
        if dimension >= size:
            raise RefluenceError(
                f"a sketch of m = {size} rows cannot hold an effective dimension of {dimension:g}: use a sketch of at "
                f"least {int(2 * dimension)} rows, or a larger damping"
            )
        damping = damping_for(values, dimension)
        return damping / (1.0 - effective_dimension(values, damping) / size)
    return _shift_over_blocks(dimension, spectra)


def _shift_over_blocks(dimension: float, spectra: dict[str, tuple[NDArray[np.float64], int | None]]) -> float:
    from scipy.optimize import brentq

    from refluence.theory import corrected_damping

    def excess(log_shift: float) -> float:
        shift, total = float(np.exp(log_shift)), 0.0
        for values, size in spectra.values():
            try:
                own = shift if size is None else corrected_damping(values, size, shift)
            except RefluenceError:
                own = 0.0
            total += effective_dimension(values, own)
        return total - dimension

    top = max(float(values.max()) for values, _ in spectra.values())
    low, high = np.log(top) - 60.0, np.log(top * sum(v.size for v, _ in spectra.values()) / dimension) + 1.0
    if excess(low) <= 0:
        raise RefluenceError(f"no damping gives an effective dimension of {dimension:g}: it is above the rank")
    return float(np.exp(brentq(excess, low, high, xtol=1e-13, rtol=1e-13)))
