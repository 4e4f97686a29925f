"""Scores that stay in their folder: read test by test, never all at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import zarr
from numpy.typing import NDArray

from refluence.scores import Scores, checked_rows
from refluence.scores_folder import open_scores, read_ids, write_ids, write_record

KEPT = 10
"""Of the most helpful and most harmful train examples of a test, in tables of their own."""
TILE_BYTES = 64 << 20
CHUNK_ROWS, CHUNK_COLUMNS = 64, 1 << 14
ENDS = ("top", "bottom")


class StoredScores:
    """Scores in a folder that `Influence.score(test, out=path)` or `Scores.save` wrote; only what is asked for is read.

    Args:
        path: of the folder.

    Attributes:
        n_train: n of the training set.
        train_ids, test_ids: row ids (or group names) of the columns and rows.
        target_damping, manifest: as in `Scores`.

    Raises:
        DataError: the path holds no scores, or of another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._group, self.manifest = open_scores(self.path)
        self.n_train = int(self.manifest["n_train"])
        self.train_ids, self.test_ids = (read_ids(self._group, name) for name in ("train_ids", "test_ids"))
        self.target_damping: float | dict[str, float] | None = self.manifest.get("target_damping")

    @property
    def shape(self) -> tuple[int, int]:
        """(n_test, n_train)."""
        return tuple(self._group["values"].shape)

    def rows(self, tests: Sequence[int]) -> Scores:
        """The scores of some test rows, by position.

        Raises:
            DataError: rows that do not exist.
        """
        chosen = np.asarray(checked_rows(tests, self.shape[0]), dtype=np.int64)
        return self._scores(chosen, lambda array: array.oindex[chosen])

    def load(self) -> Scores:
        """All scores, in memory."""
        return Scores.load(self.path)

    def tiles(self) -> Iterator[Scores]:
        """The scores of all tests in order, some at a time, 64 MB of values or a single test."""
        step = max(1, TILE_BYTES // (8 * self.shape[1]))
        for first in range(0, self.shape[0], step):
            last = min(first + step, self.shape[0])
            yield self._scores(np.arange(first, last), lambda array, a=first, b=last: array[a:b])

    def top(self, k: int = KEPT) -> pd.DataFrame:
        """The k most helpful train examples of every test example, as `Scores.top`.

        At once for the 10 that were kept when the scores were written, and for fewer where they are exact.
        """
        return self._extremes("top", k)

    def bottom(self, k: int = KEPT) -> pd.DataFrame:
        """The k most harmful train examples of every test example, as `Scores.bottom`."""
        return self._extremes("bottom", k)

    def _extremes(self, end: str, k: int) -> pd.DataFrame:
        kept = self.path / f"{end}.parquet"
        # How probable it is to be among the k largest depends on k.
        if kept.exists() and (k == KEPT or ("error" not in self._group and isinstance(k, int) and 1 <= k < KEPT)):
            frame = pd.read_parquet(kept)
            return frame[frame["rank"] <= k].reset_index(drop=True)
        return pd.concat([getattr(scores, end)(k) for scores in self.tiles()], ignore_index=True)

    def _scores(self, tests: NDArray, read: Any) -> Scores:
        error = read(self._group["error"]) if "error" in self._group else None
        return Scores(
            torch.from_numpy(read(self._group["values"])),
            self.n_train,
            self.train_ids,
            self.test_ids[tests],
            None if error is None else torch.from_numpy(error),
            self.target_damping,
            self.manifest,
        )

    def __repr__(self) -> str:
        k, n = self.shape
        return f"StoredScores({k} test × {n} train, damping {self.target_damping}, in {self.path})"


def write_tiles(folder: Path, tiles: Iterator[Scores], n_test: int) -> None:
    """Write scores that come some tests at a time, with their most helpful and most harmful train examples."""
    group: Any = zarr.open_group(str(folder), mode="w")
    ends: dict[str, list[pd.DataFrame]] = {end: [] for end in ENDS}
    first = 0
    for scores in tiles:
        if first == 0:
            _make_arrays(group, scores, n_test)
        last = first + scores.shape[0]
        group["values"][first:last] = scores.values.numpy()
        if scores.error is not None:
            group["error"][first:last] = scores.error.numpy()
        for end, frames in ends.items():
            frames.append(getattr(scores, end)(KEPT).assign(test=lambda frame, at=first: frame["test"] + at))
        first = last
    write_ids(group, "train_ids", scores.train_ids)
    write_ids(group, "test_ids", np.arange(n_test))
    for end, frames in ends.items():
        pd.concat(frames, ignore_index=True).to_parquet(folder / f"{end}.parquet")
    write_record(folder, {**scores.manifest, "n_train": scores.n_train, "target_damping": scores.target_damping})


def _make_arrays(group: Any, scores: Scores, n_test: int) -> None:
    shape = n_test, scores.shape[1]
    chunks = min(CHUNK_ROWS, n_test), min(CHUNK_COLUMNS, shape[1])
    for name, array in (("values", scores.values), ("error", scores.error)):
        if array is not None:
            group.create_array(name, shape=shape, chunks=chunks, dtype=array.numpy().dtype, compressors=None)
