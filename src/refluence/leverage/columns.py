"""Columns that carry nothing of their own: constant ones that centring removes, zeros, exact copies of another.

A copy is merged, not dropped: k equal columns x have the XXᵀ of one column √k·x, so every leverage stays as it is.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

FIRST_ROWS = 32


class ColumnCensus:
    """Watches the rows go by; exact, and after the first rows only columns still in doubt are looked at.

    Args:
        centred: whether columns that are constant count as zero.
    """

    def __init__(self, centred: bool) -> None:
        self.centred = centred
        self._first: Tensor | None = None
        self._constant: Int64[Tensor, " c"] | None = None
        self._groups: list[list[int]] = []

    def see(self, rows: Float64[Tensor, "c d"]) -> None:
        """Look at the next rows: at a few of them first, which settle most columns."""
        if self._first is None:
            self._first = rows[0].clone() if self.centred else torch.zeros_like(rows[0])
            self._constant = torch.arange(rows.shape[1], device=rows.device)
            self._drop_varying(rows[:FIRST_ROWS])
            self._groups = _split([list(range(rows.shape[1]))], rows[:FIRST_ROWS])
        for some in (rows[: FIRST_ROWS**2], rows):
            self._drop_varying(some)
        constant = set(self._constant.tolist())  # type: ignore[union-attr]
        self._groups = [[column for column in group if column not in constant] for group in self._groups]
        for some in (rows[: FIRST_ROWS**2], rows):
            self._groups = _split(self._groups, some)

    def _drop_varying(self, rows: Tensor) -> None:
        assert self._constant is not None
        assert self._first is not None
        if self._constant.numel():
            same = (rows[:, self._constant] == self._first[self._constant]).all(dim=0)
            self._constant = self._constant[same]

    def kept(self) -> tuple[Int64[Tensor, " k"], Float64[Tensor, " k"]]:
        """(columns to keep, the factor √copies of each)."""
        assert self._constant is not None
        assert self._first is not None
        copies = torch.ones_like(self._first)
        copies[self._constant] = 0
        for group in self._groups:
            if copies[group[0]]:
                copies[group[0]] = len(group)
                copies[group[1:]] = 0
        kept = copies.nonzero()[:, 0]
        return kept, copies[kept].sqrt()


def _split(groups: list[list[int]], rows: Tensor) -> list[list[int]]:
    """The groups of columns that are equal on these rows too; those of one column are left out."""
    found: list[list[int]] = []
    for group in groups:
        if len(group) < 2:
            continue
        # adding 0 makes −0 a 0; two columns are then equal where their bytes are
        columns = (rows[:, group].T.contiguous() + 0.0).cpu().numpy()
        equal: dict[bytes, list[int]] = defaultdict(list)
        for column, values in zip(group, columns, strict=True):
            equal[values.tobytes()].append(column)
        found.extend(members for members in equal.values() if len(members) > 1)
    return found
