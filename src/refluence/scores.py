"""Scores: which training examples helped and hurt each test example, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import zarr
from jaxtyping import Bool, Float, Float64
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from refluence.errors import DataError
from refluence.scores_folder import open_scores, read_ids, replacing_scores, write_ids, write_record
from refluence.top_probability import probability_in_top

CONFIDENCE = 0.95
"""Of the intervals in tables."""


@dataclass(frozen=True, eq=False)
class Scores:
    """τ_λ(g_test_i, g_train_j) for every pair; positive = helpful: removing j raises the loss of i by about score/n.

    Attributes:
        values: (n_test, n_train); columns are groups of train rows where the scores were summed by group.
        n_train: n of the training set.
        train_ids, test_ids: row ids (or group names) of the columns and rows.
        error: standard error of every value from the approximation used; None where the values are `exact`, or where
            nothing is known of their errors.
        target_damping: the damping κ that the values estimate; a dict block → κ where blocks differ.
        manifest: versions, seeds, λ, d_λ, fingerprints.
    """

    values: Float[Tensor, "k n"]
    n_train: int
    train_ids: NDArray = None  # type: ignore[assignment]
    test_ids: NDArray = None  # type: ignore[assignment]
    error: Float[Tensor, "k n"] | None = None
    target_damping: float | dict[str, float] | None = None
    manifest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        k, n = self.values.shape
        for name, size in (("test_ids", k), ("train_ids", n)):
            ids = getattr(self, name)
            ids = np.arange(size) if ids is None else np.asarray(ids)
            if ids.shape != (size,):
                raise DataError(f"{name} must have one id for each of {size} rows, not shape {ids.shape}")
            object.__setattr__(self, name, ids)
        if self.error is not None and self.error.shape != self.values.shape:
            raise DataError(f"error has shape {tuple(self.error.shape)}, the values {tuple(self.values.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(n_test, n_train)."""
        return tuple(self.values.shape)  # type: ignore[return-value]

    @property
    def exact(self) -> bool:
        """Whether there is no error: none is given, and the solver of the manifest, if any, says that it makes none."""
        return self.error is None and bool(self.manifest.get("exact", True))

    @property
    def predicted_loo_change(self) -> Float[Tensor, "k n"]:
        """Predicted change of each test measurement if the train example were removed: scores / n."""
        return self.values / self.n_train

    def interval(self, confidence: float = CONFIDENCE) -> tuple[Float[Tensor, "k n"], Float[Tensor, "k n"]]:
        """(lower, upper) normal intervals of the values; the values where they are exact, NaN where no error is known.

        Raises:
            DataError: a confidence outside (0, 1).
        """
        factor = _normal_factor(confidence)
        if self.error is None:
            ends = self.values if self.exact else torch.full_like(self.values, torch.nan)
            return ends, ends
        return self.values - factor * self.error, self.values + factor * self.error

    def indistinguishable(self, confidence: float = CONFIDENCE) -> Bool[Tensor, "k n"]:
        """Whether the interval of a pair covers 0; each pair for itself: of many, 1 − confidence miss their value.

        True everywhere where no error is known.

        Raises:
            DataError: a confidence outside (0, 1).
        """
        factor = _normal_factor(confidence)
        if self.error is None:
            return self.values == 0 if self.exact else torch.ones_like(self.values, dtype=torch.bool)
        return self.values.abs() <= factor * self.error

    def probability_in_top(self, k: int = 10) -> Float64[Tensor, "k n"]:
        """P(among the k most helpful train examples of a test), by independent normal errors.

        0 or 1 where the scores are exact, NaN where no error is known.
        """
        return self._probability(k, largest=True)

    def probability_in_bottom(self, k: int = 10) -> Float64[Tensor, "k n"]:
        """P(among the k most harmful train examples of a test)."""
        return self._probability(k, largest=False)

    def _probability(self, k: int, largest: bool) -> Float64[Tensor, "k n"]:
        k = self._count(k)
        if self.error is not None:
            return probability_in_top(self.values if largest else -self.values, self.error, k)
        if not self.exact:
            return torch.full(self.shape, torch.nan, dtype=torch.float64)
        chosen = torch.topk(self.values, k, dim=1, largest=largest).indices.cpu()
        return torch.zeros(self.shape, dtype=torch.float64).scatter_(1, chosen, 1.0)

    def _count(self, k: int) -> int:
        if not isinstance(k, Integral) or k < 1:
            raise DataError(f"k must be an integer of at least 1, not {k!r}")
        return min(int(k), self.values.shape[1])

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k most helpful train examples of every test example, the most helpful first.

        Where the scores have errors: `low` and `high` of the 95 % interval, whether it is `distinguishable` from 0, and
        `probability_in_top`, that the example is among the k most helpful.
        """
        return self._extremes(k, largest=True)

    def bottom(self, k: int = 10) -> pd.DataFrame:
        """The k most harmful train examples of every test example, the most harmful first.

        The columns are those of `top`, with `probability_in_bottom`, that it is among the k most harmful.
        """
        return self._extremes(k, largest=False)

    def _extremes(self, k: int, largest: bool) -> pd.DataFrame:
        k = self._count(k)
        _, columns = torch.topk(self.values, k, dim=1, largest=largest)
        rows = np.repeat(np.arange(self.values.shape[0]), k)
        chosen = columns.cpu().numpy().reshape(-1)
        frame = self._frame(rows, chosen, np.tile(np.arange(1, k + 1), self.values.shape[0]))
        if self.error is not None:
            frame["distinguishable"] = (frame["low"] > 0) | (frame["high"] < 0)
            name = "probability_in_top" if largest else "probability_in_bottom"
            frame[name] = self._probability(k, largest).numpy()[rows, chosen]
        return frame

    def _frame(self, rows: NDArray, columns: NDArray, rank: NDArray | None) -> pd.DataFrame:
        picked = (torch.as_tensor(rows), torch.as_tensor(columns))
        score = self.values.cpu()[picked].numpy()
        error = np.full(score.shape, np.nan) if self.error is None else self.error.cpu()[picked].numpy()
        content: dict[str, NDArray] = {"test": self.test_ids[rows]}
        if rank is not None:
            content["rank"] = rank
        content |= {
            "train": self.train_ids[columns],
            "score": score,
            "error": error,
            "predicted_loo_change": score / self.n_train,
        }
        if self.error is not None:
            half = _normal_factor(CONFIDENCE) * error
            content |= {"low": score - half, "high": score + half}
        return pd.DataFrame(content)

    def to_frame(self) -> pd.DataFrame:
        """Every pair: test, train, score, error (NaN where exact or not known), predicted_loo_change.

        Where there are errors also `low` and `high` of the 95 % interval.
        """
        k, n = self.values.shape
        return self._frame(np.repeat(np.arange(k), n), np.tile(np.arange(n), k), None)

    def to_parquet(self, path: str | Path) -> Path:
        """`to_frame` as a parquet file, some test rows at a time."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        n = self.values.shape[1]
        step = max(1, (1 << 21) // n)
        writer = None
        try:
            for first in range(0, self.values.shape[0], step):
                last = min(first + step, self.values.shape[0])
                frame = self._frame(np.repeat(np.arange(first, last), n), np.tile(np.arange(n), last - first), None)
                table = pa.Table.from_pandas(frame, preserve_index=False)
                writer = writer or pq.ParquetWriter(path, table.schema)
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()
        return path

    def rows(self, tests: Sequence[int]) -> Scores:
        """The scores of some test rows, by position.

        Raises:
            DataError: rows that do not exist.
        """
        index = torch.as_tensor(checked_rows(tests, self.values.shape[0]), device=self.values.device)
        return Scores(
            self.values[index],
            self.n_train,
            self.train_ids,
            self.test_ids[index.cpu().numpy()],
            None if self.error is None else self.error[index],
            self.target_damping,
            self.manifest,
        )

    def save(self, path: str | Path) -> Path:
        """Write a zarr group with the values, errors and ids, and the manifest as its attributes and as JSON.

        Written beside the path and then moved there; an existing directory is replaced only if it holds scores.

        Raises:
            DataError: the path holds something else, or the manifest is not JSON.
        """
        record = {**self.manifest, "n_train": self.n_train, "target_damping": self.target_damping}
        path = Path(path)
        with replacing_scores(path) as beside:
            group = zarr.open_group(str(beside), mode="w")
            group.create_array("values", data=self.values.cpu().numpy())
            if self.error is not None:
                group.create_array("error", data=self.error.cpu().numpy())
            write_ids(group, "train_ids", self.train_ids)
            write_ids(group, "test_ids", self.test_ids)
            write_record(beside, record)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote, or `Influence.score(out=path)`.

        Raises:
            DataError: the path holds no scores, or of another format.
        """
        group, manifest = open_scores(Path(path))
        return cls(
            torch.from_numpy(group["values"][...]),
            int(manifest["n_train"]),
            read_ids(group, "train_ids"),
            read_ids(group, "test_ids"),
            torch.from_numpy(group["error"][...]) if "error" in group else None,
            manifest.get("target_damping"),
            manifest,
        )

    def __repr__(self) -> str:
        k, n = self.values.shape
        kind = "with standard errors" if self.error is not None else "exact" if self.exact else "no errors known"
        return f"Scores({k} test × {n} train, {kind}, damping {self.target_damping})"


def checked_rows(rows: Sequence[int], k: int) -> list[int]:
    """Positions among k rows, those before the first counted from the end.

    Raises:
        DataError: rows that do not exist.
    """
    if wrong := [row for row in rows if not -k <= row < k]:
        raise DataError(f"there is no test row {wrong[0]!r}: the scores have {k}, 0 to {k - 1}")
    return [int(row) % k for row in rows]


def _normal_factor(confidence: float) -> float:
    """Half the width of a normal interval, in standard errors."""
    if not isinstance(confidence, Real) or not 0 < confidence < 1:
        raise DataError(f"confidence must lie between 0 and 1, not {confidence!r}")
    return float(stats.norm.ppf(0.5 + confidence / 2))
