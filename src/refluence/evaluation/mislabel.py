"""Wrong labels found by inspecting the training examples in the order of a score."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from numpy.typing import ArrayLike
from torch import Tensor

from refluence.errors import DataError
from refluence.evaluation.bootstrap import RESAMPLES, percentile_interval, resample_counts
from refluence.evaluation.estimate import Estimate

CURVE_POINTS = 200
CHUNK_NUMBERS = 1 << 22


@dataclass(frozen=True, eq=False)
class Detection:
    """How well a score finds wrong labels.

    Attributes:
        auroc: the probability that a wrong example scores above a right one, ties ½.
        average_precision: Σ over distinct scores of the precision there times the gain in recall; the share of wrong
            labels is what chance gives.
        area: under the detection curve, share found against share inspected; ½ is chance.
        best_area: the largest area possible, 1 − (share of wrong labels)/2.
        curve: rows inspected, found, low, high, best.
    """

    auroc: Estimate
    average_precision: Estimate
    area: Estimate
    best_area: float
    curve: pd.DataFrame = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """Tidy: metric, value, low, high, confidence."""
        return pd.concat([e.to_frame() for e in (self.auroc, self.average_precision, self.area)], ignore_index=True)


def mislabel(
    values: Tensor | ArrayLike,
    wrong: Tensor | ArrayLike,
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Detection:
    """How early wrong labels come when examples are inspected from the highest value down.

    Tied examples come in random order, so that the curve is its expectation and depends on no row index. The intervals
    resample the wrong and the right examples, each.

    Args:
        values: (n,), high = suspicious, such as `influence.self_influence()`.
        wrong: the rows with wrong labels, or (n,) booleans.
        resamples, confidence, seed: of the bootstrap.

    Raises:
        DataError: values that are not one finite number an example, or none wrong, or none right.
    """
    suspicion = torch.as_tensor(values).detach().cpu().double()
    if suspicion.ndim != 1 or not bool(torch.isfinite(suspicion).all()):
        raise DataError(f"values must be one finite number for each train example, not shape {tuple(suspicion.shape)}")
    marked = wrong_rows(wrong, len(suspicion))
    levels, level = torch.unique(-suspicion, return_inverse=True)
    shares = torch.linspace(0, 1, min(CURVE_POINTS, len(suspicion)) + 1, dtype=torch.float64)
    point = _detection(level, len(levels), marked, torch.ones(1, len(marked), dtype=torch.float64), shares)
    rows_wrong, rows_right = marked.nonzero()[:, 0], (~marked).nonzero()[:, 0]
    drawn_wrong = resample_counts(len(rows_wrong), resamples, seed, "wrong labels")
    step = max(1, CHUNK_NUMBERS // len(marked))
    drawn_right = resample_counts(len(rows_right), resamples, seed, "right labels")
    parts = []
    for some_wrong, some_right in zip(drawn_wrong.split(step), drawn_right.split(step), strict=True):
        weights = torch.empty(len(some_wrong), len(marked), dtype=torch.float64)
        weights[:, rows_wrong], weights[:, rows_right] = some_wrong, some_right
        parts.append(_detection(level, len(levels), marked, weights, shares))
    draws = {name: torch.cat([part[name] for part in parts]) for name in point}
    low, high = percentile_interval(draws["curve"], confidence)
    share_wrong = float(marked.double().mean())
    curve = pd.DataFrame(
        {
            "inspected": shares.numpy(),
            "found": point["curve"][0].numpy(),
            "low": low.numpy(),
            "high": high.numpy(),
            "best": np.minimum(1, shares.numpy() / share_wrong),
        }
    )

    def estimate(name: str) -> Estimate:
        low, high = percentile_interval(draws[name], confidence)
        return Estimate(name, float(point[name][0]), float(low), float(high), confidence)

    return Detection(
        estimate("auroc"), estimate("average_precision"), estimate("detection_area"), 1 - share_wrong / 2, curve
    )


def wrong_rows(wrong: Tensor | ArrayLike, n: int) -> Tensor:
    """Rows, or booleans, as (n,) booleans.

    Raises:
        DataError: rows that do not exist or are named twice, or all or none of them.
    """
    given = torch.as_tensor(wrong).cpu()
    given = given.long() if given.numel() == 0 else given
    if given.dtype == torch.bool:
        if given.shape != (n,):
            raise DataError(f"wrong has shape {tuple(given.shape)}: give row numbers, or {n} booleans")
        marked = given
    else:
        if given.ndim != 1 or given.is_floating_point() or bool(((given < 0) | (given >= n)).any()):
            raise DataError(f"wrong must be row numbers from 0 to {n - 1}, or {n} booleans")
        marked = torch.zeros(n, dtype=torch.bool)
        marked[given.long()] = True
        if int(marked.sum()) < len(given):
            raise DataError(f"wrong names a row twice: give each row once, or a mask as {n} booleans")
    if not bool(marked.any()) or bool(marked.all()):
        raise DataError(f"{int(marked.sum())} of {n} labels are wrong: detection needs wrong and right ones")
    return marked


def _detection(
    level: Tensor, levels: int, marked: Tensor, weights: Float64[Tensor, "r n"], shares: Float64[Tensor, " s"]
) -> dict[str, Tensor]:
    """The three numbers and the curve, in resamples that hold example i w_i times; level 0 is the most suspicious."""
    count = torch.zeros(len(weights), levels, dtype=weights.dtype)
    wrong = count.index_add(1, level, weights * marked)
    right = count.index_add(1, level, weights * ~marked)
    found, false = wrong.cumsum(dim=1), right.cumsum(dim=1)
    total, others = found[:, -1:], false[:, -1:]
    seen = found + false
    auroc = (wrong * (others - false + right / 2)).sum(dim=1) / (total * others)[:, 0]
    precision = found / seen.clamp(min=1)
    inspected = torch.cat([torch.zeros_like(total), seen / seen[:, -1:]], dim=1)
    recall = torch.cat([torch.zeros_like(total), found / total], dim=1)
    share_wrong = (total / (total + others))[:, 0]
    return {
        "auroc": auroc,
        "average_precision": (precision * wrong / total).sum(dim=1),
        "detection_area": share_wrong / 2 + (1 - share_wrong) * auroc,
        "curve": torch.stack([_interpolated(shares, x, y) for x, y in zip(inspected, recall, strict=True)]),
    }


def _interpolated(at: Float64[Tensor, " s"], x: Float64[Tensor, " p"], y: Float64[Tensor, " p"]) -> Tensor:
    return torch.from_numpy(np.interp(at.numpy(), x.numpy(), y.numpy()))
