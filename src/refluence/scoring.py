"""From a fit to `Scores`: the blocks' scores and errors added, and the columns as they were asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from refluence.batches import Batches
from refluence.columns import Columns, ColumnSums, checked_weights, group_codes
from refluence.distributed.group_parts import writes, written
from refluence.errors import RefluenceError
from refluence.fitting import Fit
from refluence.gradients.rows import GradientRows
from refluence.progress import track
from refluence.scores import Scores
from refluence.scores_folder import replacing_scores
from refluence.solvers.state import Shifts
from refluence.stored_scores import StoredScores, write_tiles

MATRICES_PER_TILE = 8


def columns_of(
    fit: Fit,
    shifts: Shifts,
    weights: Sequence[float] | Tensor | None,
    groups: str | Iterable[Any] | None,
    normalize: str | None,
) -> Columns:
    """What `Influence.score` is to do to the columns; arguments as there.

    Raises:
        DataError: wrong weights or groups.
    """
    n = fit.rows.n
    factors = torch.ones(n, dtype=torch.float64, device=fit.rows.device)
    if normalize is not None:
        factors = factors / _column_norms(fit, shifts, normalize)
    if weights is not None:
        factors = factors * checked_weights(weights, n, negative=True).to(factors)
    if groups is not None:
        codes, ids = group_codes(groups, fit.rows.batches)
        return Columns(ids, factors, ColumnSums(factors, codes, len(ids)))
    return Columns(np.arange(n), None if normalize is None and weights is None else factors)


def added_scores(
    fit: Fit, tests: GradientRows, shifts: Shifts, columns: Columns, errors: bool, manifest: dict[str, Any]
) -> Scores:
    """The scores over all blocks of parameters, with their standard errors unless `errors` is False.

    Raises:
        RefluenceError: scores that are not finite.
    """
    parts = fit.state.scores(tests, shifts)
    deviations = fit.state.deviations(tests, shifts, columns.sums) if errors else None
    values = _total(parts)
    error = None if deviations is None else _combined(deviations, fit.state.independent_blocks)
    return _finished(fit, values, error, columns, manifest)


def scores_in_folder(
    fit: Fit,
    tests: GradientRows,
    shifts: Shifts,
    columns: Columns,
    errors: bool,
    manifest: dict[str, Any],
    folder: Path,
) -> StoredScores:
    """`added_scores` written to a folder some tests at a time, so that they are never in memory all at once.

    Raises:
        DataError: the folder holds something else.
        RefluenceError: scores that are not finite.
    """
    shown = track(tiles_of(tests, fit.rows.n), "scores", -(-tests.n // tile_size(tests, fit.rows.n)), tests.progress)
    scores = (added_scores(fit, part, shifts, columns, errors, manifest) for part in shown)
    if writes():
        with replacing_scores(folder) as beside:
            write_tiles(beside, scores, tests.n)
    else:
        for _ in scores:
            pass
    written()
    return StoredScores(folder)


def tiles_of(tests: GradientRows, n: int) -> Iterator[GradientRows]:
    """The tests, so many at a time that their scores with n train examples fit the memory; whole batches if they do."""
    size, whole = tile_size(tests, n), tests.batches
    for first in range(0, tests.n, size):
        part = whole.select(range(first, min(first + size, tests.n)))
        batches = Batches(part, whole.batch_size, whole.device, whole.dtype, whole.name)
        yield GradientRows(tests.capture, batches, tests.objective, tests.memory, progress=False)


def tile_size(tests: GradientRows, n: int) -> int:
    """Tests of one tile: scores, errors and what these are made of are (k, n) matrices in float64."""
    size, batch = max(1, tests.memory // (8 * MATRICES_PER_TILE * n)), tests.batches.batch_size
    return size if size < batch else size - size % batch


def scores_by_block(
    fit: Fit,
    tests: GradientRows,
    shifts: Shifts,
    columns: Columns,
    errors: bool,
    manifest: dict[str, Any],
    targets: Mapping[str, float],
) -> dict[str, Scores]:
    """Block → the scores that come from its parameters, with its own of the dampings `targets`.

    Raises:
        RefluenceError: scores that are not finite.
    """
    parts = fit.state.scores(tests, shifts)
    deviations = fit.state.deviations(tests, shifts, columns.sums) if errors else None
    found = dict(deviations) if deviations is not None else {}
    return {
        block: _finished(
            fit,
            part.contiguous(),
            found.get(block),
            columns,
            {**manifest, "block": block, "target_damping": targets[block]},
        )
        for block, part in parts
    }


def _finished(
    fit: Fit,
    values: Float[Tensor, "k n"],
    error: Float[Tensor, "k _"] | None,
    columns: Columns,
    manifest: dict[str, Any],
) -> Scores:
    values, error = columns.values(values), None if error is None else columns.errors(error)
    if not bool(torch.isfinite(values).all()):
        raise RefluenceError("the scores hold NaN or Inf: use a larger damping")
    return Scores(
        values.cpu(),
        fit.rows.n,
        columns.ids,
        error=None if error is None else error.cpu(),
        target_damping=manifest["target_damping"],
        manifest=manifest,
    )


def _column_norms(fit: Fit, shifts: Shifts, normalize: str) -> Float[Tensor, " n"]:
    if normalize == "theta-relatif":
        squared = fit.state.inverse_norms(shifts)
    else:
        squared = fit.state.self_influence(shifts)
        if fit.curvature.weights is not None:
            squared = squared * fit.curvature.weights.to(squared)
    norms = squared.clamp(min=0).sqrt()
    return torch.where(norms > 0, norms, torch.inf)


def _combined(parts: Iterable[tuple[str, Float[Tensor, "k n"]]], independent: bool) -> Float[Tensor, "k n"]:
    """Standard errors of a sum over blocks: variances add where they are independent, else the errors may."""
    if not independent:
        return _total(parts)
    return _total((block, part.square_()) for block, part in parts).sqrt_()


def _total(parts: Iterable[tuple[str, Float[Tensor, "k n"]]]) -> Float[Tensor, "k n"]:
    total: Tensor | None = None
    for _, part in parts:
        total = part.contiguous() if total is None else total.add_(part)
    assert total is not None
    return total
