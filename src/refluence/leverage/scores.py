"""Leverage scores, and what is known of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from refluence.errors import DataError
from refluence.files import replacing

FORMAT = "refluence-leverage-1"
_METADATA = b"refluence"


@dataclass(frozen=True)
class RankGap:
    """Where the rank was cut: the smallest singular value kept, the largest dropped (0 where none was), and the cut.

    `ratio` is kept / max(dropped, cut if none was dropped); below `CLEAR` the rank is not certain.
    """

    kept: float
    dropped: float
    cut: float

    CLEAR = 100.0

    @property
    def ratio(self) -> float:
        """How much larger the smallest kept singular value is than what was not kept."""
        return self.kept / (self.dropped or self.cut)

    @property
    def clear(self) -> bool:
        """Whether a gap separates what was kept from what was dropped."""
        return self.ratio >= self.CLEAR


@dataclass(frozen=True, eq=False)
class LeverageScores:
    """h_i = x_iᵀ (XᵀX + nλI)⁺ x_i of every row.

    Attributes:
        values: (n,), each in [0, 1] where the method is exact.
        effective_dimension: d_λ = Σ_i h_i; the rank where λ = 0. Of an intercept, 1 is counted.
        damping: λ, in units of XᵀX/n.
        method: what computed them.
        rank: of X (centred and with the intercept, where asked for), where λ = 0.
        gap: where the rank was cut, where λ = 0.
        relative_error: of a score, root mean square: measured on random rows for "sketch" and "recursive"; a bound on
            the rounding for "gram"; None for the others, exact to the rounding ε·σ₁/σ of singular values that count.
    """

    values: Float64[Tensor, " n"]
    effective_dimension: float
    damping: float
    method: str
    rank: int | None = None
    gap: RankGap | None = None
    relative_error: float | None = None

    def top(self, k: int = 10) -> Int64[Tensor, " k"]:
        """The k rows of highest leverage, the highest first; of equal ones the first."""
        return torch.sort(self.values, descending=True, stable=True).indices[: self._count(k)]

    def bottom(self, k: int = 10) -> Int64[Tensor, " k"]:
        """The k rows of lowest leverage, the lowest first; of equal ones the first."""
        return torch.sort(self.values, stable=True).indices[: self._count(k)]

    def _count(self, k: int) -> int:
        if not isinstance(k, Integral) or isinstance(k, bool) or k < 1:
            raise DataError(f"k must be an integer of at least 1, not {k!r}")
        return min(int(k), self.values.numel())

    def to_frame(self) -> pd.DataFrame:
        """One row for each example: row, leverage, rank (1 = the highest)."""
        order = self.top(self.values.numel()).cpu()
        rank = torch.empty_like(order)
        rank[order] = torch.arange(1, order.numel() + 1)
        return pd.DataFrame({"row": range(order.numel()), "leverage": self.values.cpu().numpy(), "rank": rank.numpy()})

    def facts(self) -> dict[str, Any]:
        """All but the values, JSON-able."""
        return {
            "n": self.values.numel(),
            "effective_dimension": self.effective_dimension,
            "damping": self.damping,
            "method": self.method,
            "rank": self.rank,
            "gap": None if self.gap is None else asdict(self.gap),
            "relative_error": self.relative_error,
        }

    def save(self, path: str | Path) -> Path:
        """Write one parquet file, `to_frame` with the facts in its metadata, in one step."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        table = pa.Table.from_pandas(self.to_frame(), preserve_index=False)
        record = json.dumps({"format": FORMAT, **self.facts()}).encode()
        with replacing(path) as temporary:
            pq.write_table(
                table.replace_schema_metadata({**(table.schema.metadata or {}), _METADATA: record}), temporary
            )
        return path

    @staticmethod
    def load(path: str | Path) -> LeverageScores:
        """Read what `save` wrote.

        Raises:
            DataError: another file, or of another format.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(Path(path))
            record = json.loads((table.schema.metadata or {})[_METADATA])
        except (OSError, KeyError, ValueError, pa.ArrowInvalid) as error:
            raise DataError(f"{path} holds no leverage scores: it should be a file of LeverageScores.save") from error
        if record.get("format") != FORMAT:
            raise DataError(f"{path} has format {record.get('format')!r}, this version reads {FORMAT!r}")
        gap = record["gap"]
        return LeverageScores(
            torch.from_numpy(table["leverage"].to_numpy().copy()),
            record["effective_dimension"],
            record["damping"],
            record["method"],
            record["rank"],
            None if gap is None else RankGap(**gap),
            record["relative_error"],
        )

    def __repr__(self) -> str:
        plain = f"rank {self.rank}" if self.rank is not None else f"λ = {self.damping:.4g}"
        error = "" if self.relative_error is None else f", relative error {self.relative_error:.2g}"
        return (
            f"LeverageScores({self.values.numel():,} rows, {plain}, d_λ = {self.effective_dimension:.6g}, "
            f"{self.method}{error})"
        )
