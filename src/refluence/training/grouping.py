"""Which models are trained together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

# A group's parameters, gradients, optimiser state and activations stay within a share of the last cache.
GROUP_BYTES = 48 << 20
SMALLEST_GROUP_BYTES = GROUP_BYTES // 4


@dataclass(frozen=True)
class Grouping:
    """A partition of models.

    Args:
        groups: the indices of each group's models.
        together: whether the models of a group are trained together.
        reason: why in this way, in a few words.
    """

    groups: tuple[tuple[int, ...], ...]
    together: bool
    reason: str


def choose_groups(
    sizes: Mapping[int, int],
    largest: int | None,
    workers: int,
    reason: str | None = None,
    *,
    each: int = 0,
    memory: int = 0,
    cached: bool = True,
) -> Grouping:
    """Groups of models with as many rows each, as large as memory holds and the caches serve well.

    The choice is by arithmetic alone, so that the same call makes the same groups.

    Args:
        sizes: model → its number of rows.
        largest: most models a group, 1 for no groups; None: chosen here.
        workers: groups at work at once.
        reason: why there are no groups, with `largest` 1.
        each: bytes of a model in training.
        memory: bytes that all may take.
        cached: whether a group should fit in the processor's cache.
    """
    if largest == 1:
        return Grouping(tuple((i,) for i in sizes), False, reason or "")
    fits = max(1, memory // max(1, workers * each))
    quick = max(1, GROUP_BYTES // max(1, each)) if cached and largest is None else fits
    size = min(fits, quick, largest or fits)
    groups: list[tuple[int, ...]] = []
    for rows in dict.fromkeys(sizes.values()):
        alike = [i for i, own in sizes.items() if own == rows]
        # Work for every worker, but in groups that are worth their overhead; and all workers finish together.
        worth = len(alike) * each // SMALLEST_GROUP_BYTES
        count = max(math.ceil(len(alike) / size), min(workers, worth, len(alike)))
        at_once = max(1, min(workers, count))
        count = min(len(alike), at_once * math.ceil(count / at_once))
        base, more = divmod(len(alike), count)
        start = 0
        for k in range(count):
            stop = start + base + (k < more)
            groups.append(tuple(alike[start:stop]))
            start = stop
    sizes_of = sorted({len(group) for group in groups})
    text = f"{sizes_of[0]}" if len(sizes_of) == 1 else f"{sizes_of[0]} to {sizes_of[-1]}"
    return Grouping(tuple(groups), True, f"{text} at a time, {each / 1e6:.1f} MB each")
