"""Approximate leverage from a random projection of the rows (Drineas, Magdon-Ismail, Mahoney & Woodruff, JMLR 2012)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.errors import RefluenceError
from refluence.leverage.examples import Examples
from refluence.sketches import SJLT
from refluence.sketches.base import ColumnSketch

ROWS_PER_COLUMN = 4
NONZEROS = 8


def default_sketch(d: int, accuracy: float, seed: int) -> SJLT:
    """m = max(4d, d + 4/ε²) rows: the relative variance of a score is then at most ε²/2 (2/(m − d) for Gaussian S)."""
    wanted = max(ROWS_PER_COLUMN * d, d + 4 / accuracy**2)
    return SJLT(NONZEROS * int(np.ceil(wanted / NONZEROS)), NONZEROS, seed)


def sketched_rows(examples: Examples, sketch: ColumnSketch) -> Float64[Tensor, "m k"]:
    """SX by one pass, E[SᵀS] = I; S acts on the rows of X, which are its columns.

    Raises:
        RefluenceError: a sketch with fewer rows than X has columns, or with as many rows as X.
    """
    if not examples.d < sketch.m < examples.n:
        raise RefluenceError(
            f"a sketch of m = {sketch.m} rows of {examples.n:,} examples with {examples.d:,} features is of no use: m "
            'must lie between the two. Use method="auto", which is exact'
        )
    total = torch.zeros(examples.d, sketch.m, dtype=torch.float64, device=examples.matrix.device)
    start = 0
    for rows in examples.reduced("sketch of the rows"):
        sketch.accumulate(total, rows.T, start)
        start += rows.shape[0]
    return examples.restrict(total).T
