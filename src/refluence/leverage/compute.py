"""`leverage_scores`: the input, the damping, the way of computing, the checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from refluence import damping as dampings
from refluence.damping import EffectiveDimension
from refluence.errors import RefluenceError
from refluence.leverage.examples import Examples, checked_weights
from refluence.leverage.matrix import FeatureMatrix
from refluence.leverage.routes import WAYS, Ridge, Wanted
from refluence.leverage.scores import LeverageScores
from refluence.sketches.base import ColumnSketch, Sketch

METHODS = tuple(WAYS)


def leverage_scores(
    X: Any,
    ridge: Ridge = 0.0,
    method: str = "auto",
    *,
    columns: Sequence[str] | None = None,
    intercept: bool = False,
    center: bool = False,
    weights: Sequence[float] | Tensor | None = None,
    rtol: float | None = None,
    sketch: Sketch | None = None,
    accuracy: float = 0.25,
    seed: int = 0,
    progress: bool = True,
) -> LeverageScores:
    """h_i(λ) = x_iᵀ (XᵀX + nλI)⁺ x_i of every row, in float64, each row read twice and never all at once.

    At λ = 0 they are the diagonal of the projection on the column space of X: Σ h = rank, 0 ≤ h ≤ 1, h = 1 for a row
    that alone carries a direction. With λ > 0, Σ h = d_λ.

    Args:
        X: n examples by d features: a tensor, an array, a DataFrame, or the path of a .npy file (memory-mapped), a zarr
            array, a parquet or a CSV file.
        ridge: λ in units of XᵀX/n: a number; `rf.RelativeDamping(c)`, c·tr(XᵀX/n)/d; `rf.EffectiveDimension(k)`, the λ
            with Σ h = k.
        method: "exact", the triangular factor and its singular values; "gram", XᵀX, half the time and singular values
            down to √ε·σ₁ only; "dual", XXᵀ, for n < d; "sketch" and "recursive", approximate; "auto": "dual"
            for n < d, else "gram" where its rounding is below 1e-9 and, where it is not, "deflated": the small
            directions again by Gram matrices of their own, as accurate as "exact" in less time.
        columns: of a table, the features; None: all.
        intercept: the leverage of [1 X], the column of ones not damped: h = w_i/Σw + that of the centred rows.
        center: the leverage of the centred rows.
        weights: w ≥ 0 of each row, whose leverage is then that of √w_i x_i.
        rtol: at λ = 0, singular values above rtol·σ₁ count; None: above max(n, d)·ε·σ₁.
        sketch: of method "sketch": `rf.sketches.SJLT`, `Gaussian` or `Rademacher` of m rows, d < m < n; None: SJLT of
            max(4d, d + 4/ε²) rows with 8 nonzeros a column.
        accuracy: ε, the relative error that "sketch" and "recursive" aim at; what they reached is `relative_error`.
        seed: of the random methods.
        progress: whether long passes show a bar.

    Raises:
        DataError: what is no matrix of numbers; wrong weights or columns.
        NonFiniteError: NaN or Inf, with its row and column.
        RefluenceError: a negative ridge, one that no λ ≥ 0 gives, an unknown method.
    """
    ridge = checked_ridge(ridge, intercept)
    if method not in METHODS:
        raise RefluenceError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    if rtol is not None and not 0 < rtol < 1:
        raise RefluenceError(f"rtol must lie between 0 and 1, not {rtol!r}")
    if sketch is not None and not isinstance(sketch, ColumnSketch):
        raise RefluenceError(f"sketch must be one of rows, such as rf.sketches.SJLT(4096), not {type(sketch).__name__}")
    if not 0 < accuracy < 1:
        raise RefluenceError(f"accuracy must lie between 0 and 1, not {accuracy!r}")
    matrix = FeatureMatrix(X, columns)
    examples = Examples(matrix, intercept or center, checked_weights(weights, matrix), progress)
    wanted = Wanted(examples, ridge, rtol, sketch, accuracy, seed)
    found = WAYS[method](wanted)
    if not intercept:
        return found
    return replace(
        found,
        values=(found.values + examples.intercept()).clamp(max=1),
        effective_dimension=found.effective_dimension + 1,
        rank=None if found.rank is None else found.rank + 1,
    )


def checked_ridge(ridge: Any, intercept: bool) -> Ridge:
    """λ as a number or a rule; with an intercept, the effective dimension of the rest."""
    if isinstance(ridge, (str, dict)):
        raise RefluenceError(
            f"ridge must be a number ≥ 0, rf.RelativeDamping(c) or rf.EffectiveDimension(k), not {ridge!r}"
        )
    found = dampings.check_damping(ridge)
    if isinstance(found, EffectiveDimension) and intercept:
        if found.dimension <= 1:
            raise RefluenceError(f"EffectiveDimension({found.dimension:g}) leaves nothing beside the intercept's 1")
        return EffectiveDimension(found.dimension - 1)
    return found  # type: ignore[return-value]
