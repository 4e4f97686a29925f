"""Which train examples each retrained model sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from refluence.errors import DataError

Rows = int | np.integer | Sequence[int] | np.ndarray | Tensor


def random_subsets(n: int, count: int, share: float = 0.5, seed: int = 0) -> Bool[Tensor, "m n"]:
    """Masks of `count` random subsets of ⌊share·n⌋ of n examples, True where the example is in.

    Subset s is `np.random.default_rng(seed + s).choice(n, int(share·n), replace=False)`, the scheme of the published
    ground truths (dattri, `retrain_lds`). Seeds fewer than `count` apart share subsets.

    Raises:
        DataError: no subsets, or a share that leaves no or all examples.
    """
    size = int(share * n)
    if count < 1:
        raise DataError(f"the number of subsets must be at least 1, not {count!r}")
    if not 0 < size < n:
        raise DataError(f"a share of {share!r} of {n} examples is {size}: it must leave some in and some out")
    masks = torch.zeros(count, n, dtype=torch.bool)
    for s in range(count):
        masks[s, torch.from_numpy(np.random.default_rng(seed + s).choice(n, size, replace=False))] = True
    return masks


def leave_out(n: int, groups: Sequence[Rows] | np.ndarray | Tensor) -> Bool[Tensor, "m n"]:
    """Masks of all n examples but one, or but a group of them, for every entry of `groups`.

    Raises:
        DataError: no groups, a row outside 0…n−1, a row twice in a group, or a group of all examples.
    """
    if len(groups) == 0:
        raise DataError("there is nothing to leave out: give rows, or groups of rows")
    masks = torch.ones(len(groups), n, dtype=torch.bool)
    for s, rows in enumerate(removed_rows(groups, n)):
        masks[s, list(rows)] = False
    return masks


def removed_rows(removals: Sequence[Rows] | np.ndarray | Tensor, n: int) -> list[tuple[int, ...]]:
    """The rows of every removal, whose entry is a row or several rows that are left out together.

    Raises:
        DataError: a row outside 0…n−1, a row twice in a removal, or a removal of all examples.
    """
    found: list[tuple[int, ...]] = []
    for i, one in enumerate(removals):
        single = isinstance(one, int) or getattr(one, "ndim", 1) == 0
        rows = (int(one),) if single else tuple(int(row) for row in one)  # type: ignore[arg-type, union-attr]
        if wrong := [row for row in rows if not 0 <= row < n]:
            raise DataError(f"removal {i} has row {wrong[0]}, but the train examples are 0 to {n - 1}")
        if len(set(rows)) < len(rows):
            raise DataError(f"removal {i} has a row twice: {sorted(row for row in set(rows) if rows.count(row) > 1)}")
        if len(rows) == n:
            raise DataError(f"removal {i} leaves no example: keep at least one of the {n}")
        found.append(rows)
    return found
