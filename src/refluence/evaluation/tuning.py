"""The damping by its use: chosen on some test examples, reported on the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from refluence.batches import Batches, Data
from refluence.damping import DampingChoice
from refluence.errors import DataError
from refluence.evaluation.bootstrap import RESAMPLES
from refluence.evaluation.estimate import Estimate
from refluence.evaluation.ground_truth import GroundTruth
from refluence.evaluation.lds import lds
from refluence.influence import Influence
from refluence.progress import track
from refluence.scores import Scores
from refluence.training import stream


@dataclass(frozen=True, eq=False)
class Tuning:
    """A damping chosen by held-out LDS.

    Attributes:
        damping: the entry of the grid with the highest LDS on the chosen rows.
        influence: the fit at that damping.
        chosen_rows: test rows that it was chosen on.
        reported_rows: the others, the only ones to report a result on.
        reported: the LDS there.
        scores: of the reported rows, whose numbers are its test ids.
        table: one row an entry of the grid: damping, effective_dimension, lds, low, high, all on the chosen rows.
        at_edge: whether the choice is the first or last of the grid, so that a wider one may be better.
    """

    damping: DampingChoice
    influence: Influence
    chosen_rows: list[int]
    reported_rows: list[int]
    reported: Estimate
    scores: Scores
    table: pd.DataFrame = field(repr=False)
    at_edge: bool = False


def tune_damping(
    influence: Influence,
    test: Data,
    ground_truth: GroundTruth,
    grid: Sequence[DampingChoice],
    *,
    share: float = 0.1,
    measurement: str = "loss",
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> Tuning:
    """Choose λ by LDS on a random share of the test rows; report on the other rows only.

    The best of a grid on the rows that are then reported is too good by the noise that it was chosen for.

    Args:
        influence: a fitted `Influence`; each λ is `influence.at(λ)`.
        test: the test rows of the ground truth.
        ground_truth: models retrained on subsets.
        grid: dampings to try, ascending: numbers, `RelativeDamping`, `EffectiveDimension`.
        share: of the test rows to choose on.
        measurement, resamples, confidence: as of `lds`.
        seed: of the share and the bootstrap.
        progress: whether a bar is shown.

    Raises:
        DataError: an empty grid, other tests than the ground truth's, a share that leaves no test row on a side, or no
            defined LDS on the chosen rows.
    """
    dampings = list(grid)
    if not dampings:
        raise DataError("the grid of dampings is empty")
    tests = Batches(test, name="test data")
    if tests.n != ground_truth.n_test:
        raise DataError(f"`test` has {tests.n} rows and the ground truth {ground_truth.n_test}: give its test rows")
    count = round(share * tests.n)
    if not 1 <= count < tests.n:
        raise DataError(
            f"share={share!r} of {tests.n} test rows chooses on {count} of them: at least one row must be on each side"
        )
    generator = np.random.default_rng(stream(seed, "damping rows"))
    chosen_rows = sorted(int(row) for row in generator.choice(tests.n, count, replace=False))
    reported_rows = sorted(set(range(tests.n)) - set(chosen_rows))
    settings = {"measurement": measurement, "resamples": resamples, "confidence": confidence, "seed": seed}
    held_out, truth = tests.select(chosen_rows), ground_truth.tests(chosen_rows)
    rows, fits = [], []
    for damping in track(dampings, "dampings", enabled=progress):
        fit = influence.at(damping)
        found = lds(fit.score(held_out), truth, **settings)  # type: ignore[arg-type]
        fits.append(fit)
        rows.append(
            {
                "damping": fit.damping if isinstance(fit.damping, float) else np.nan,
                "effective_dimension": fit.effective_dimension,
                "lds": found.value,
                "low": found.low,
                "high": found.high,
            }
        )
    table = pd.DataFrame(rows)
    if table["lds"].isna().all():
        raise DataError(f"no damping has an LDS on the {count} chosen test rows: raise `share`, or take more subsets")
    best = int(np.nanargmax(table["lds"].to_numpy()))
    scores = replace(fits[best].score(tests.select(reported_rows)), test_ids=np.array(reported_rows))
    reported = lds(scores, ground_truth.tests(reported_rows), **settings)  # type: ignore[arg-type]
    at_edge = len(dampings) > 1 and best in (0, len(dampings) - 1)
    return Tuning(dampings[best], fits[best], chosen_rows, reported_rows, reported, scores, table, at_edge)
