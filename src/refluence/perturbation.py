"""How scores change with the inputs of the training examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from refluence.errors import DataError
from refluence.fitting import Fit
from refluence.gradients.mixed import mixed_products


def train_rows(rows: Sequence[int] | None, n: int) -> list[int]:
    """The train rows asked for; None: all n.

    Raises:
        DataError: rows that do not exist, or none.
    """
    chosen = list(range(n)) if rows is None else [int(row) for row in rows]
    if wrong := [row for row in chosen if not 0 <= row < n]:
        raise DataError(f"rows has {wrong[0]}, but the train examples are 0 to {n - 1}")
    if not chosen:
        raise DataError("rows is empty: give at least one train row, or None for all")
    return chosen


def input_derivatives(
    fit: Fit,
    names: Sequence[str],
    directions: Float[Tensor, "k d"],
    rows: Sequence[int],
    inputs: Callable[[Any], Tensor],
) -> Iterator[tuple[list[int], Float[Tensor, "k b ..."]]]:
    """∂/∂x_j [w_j s_iᵀg_j] for every direction s_i and train row j, batch by batch: (train rows, (k, b, *x)).

    With s_i = (C + μI)⁻¹g_i of a test it is ∂τ_ij/∂x_j, C held fixed.

    Args:
        fit: the model, its loss, and the train examples with their weights w.
        names: the parameters, in the order of the directions' columns.
        directions: s, one a row.
        rows: train rows, in the order wanted.
        inputs: which tensor of a batch is x.

    Raises:
        TaskError: as `mixed_products`.
    """
    batches = fit.rows.batches
    for first in range(0, len(rows), batches.batch_size):
        some = list(rows[first : first + batches.batch_size])
        batch = batches.select(some)
        with fit.capture.ready():
            found = mixed_products(fit.model, fit.capture.loss, names, batch, directions, inputs)
        if fit.curvature.weights is not None:
            weights = fit.curvature.weights[some].to(found)
            found = found * weights.reshape(1, -1, *[1] * (found.ndim - 2))
        yield some, found
