"""How many rows a sketch needs for a wanted error.

Theorem 2 ("A Unified Theory of Random Projection for Influence Functions", arXiv 2602.10449): with some
(d_λ + log 1/δ)/ε² rows, |τ̃−τ| ≤ ε√τ_0(g,g)√τ_0(g',g') for all g, g' in range(C) together, with probability 1 − δ. The
theorem has no constants; those here are calibrated on real gradients.
"""

from __future__ import annotations

import math

from refluence.errors import RefluenceError

ROWS = 0.65
LOG_ROWS = 0.5
"""c and c' of m = c·(d_λ + c'·log(1/δ))/ε², by `python -m benchmarks.sketch_size`; "Sketch size" in docs/theory.md."""


def sketch_size(d_lambda: float, epsilon: float, delta: float = 0.05) -> int:
    """m = ⌈max(c·(d_λ + c'·log(1/δ))/ε², d_λ(1+ε)²/(4ε))⌉: a sketch's error is below ε with probability 1 − δ.

    ε is that of Theorem 2: |τ̃−τ| ≤ ε√τ_0(g,g)√τ_0(g',g') for all g, g' in range(C), with τ̃ at λ as published
    (`rf.solvers.Sketched(..., corrected=False)`). c = 0.65 and c' = 0.5 are calibrated on real gradients, not proven.
    The second form is what the bias alone needs: τ̃ estimates τ at κ > λ, which is off by up to (√κ−√λ)/(√κ+√λ).

    Args:
        d_lambda: d_λ ≥ 0.
        epsilon: ε, 0 < ε < 1.
        delta: δ, 0 < δ < 1.
    """
    if not 0 < epsilon < 1:
        raise RefluenceError(f"epsilon must lie between 0 and 1, not {epsilon!r}: errors never exceed √τ_0√τ_0'")
    _check(d_lambda, delta)
    fluctuation = ROWS * (d_lambda + LOG_ROWS * math.log(1.0 / delta)) / epsilon**2
    bias = d_lambda * (1.0 + epsilon) ** 2 / (4.0 * epsilon)
    return math.ceil(max(fluctuation, bias))


def achieved_epsilon(m: int, d_lambda: float, delta: float = 0.05) -> float:
    """The ε that m rows are good for: the inverse of `sketch_size`, at most 1, which no error exceeds.

    Args:
        m: the rows of the sketch.
        d_lambda: d_λ ≥ 0.
        delta: δ, 0 < δ < 1.
    """
    if m < 1:
        raise RefluenceError(f"a sketch has at least 1 row, not {m!r}")
    _check(d_lambda, delta)
    fluctuation = math.sqrt(ROWS * (d_lambda + LOG_ROWS * math.log(1.0 / delta)) / m)
    left = math.sqrt(max(0.0, 1.0 - d_lambda / m))
    return min(1.0, max(fluctuation, (1.0 - left) / (1.0 + left)))


def _check(d_lambda: float, delta: float) -> None:
    if not (0 <= d_lambda < math.inf and 0 < delta < 1):
        raise RefluenceError(f"d_lambda must be finite, ≥ 0, and delta between 0 and 1, not {d_lambda!r} and {delta!r}")
