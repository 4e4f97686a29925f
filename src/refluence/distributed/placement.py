"""Which worker each stretch of the rows is at home on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class Placement:
    """The homes of stretches: shared out in order and in proportion to the threads, and kept while a worker lives.

    Args:
        workers: address → threads.
        count: stretches.

    Attributes:
        homes: address of each stretch's worker.
    """

    def __init__(self, workers: Mapping[str, int], count: int) -> None:
        addresses = slots(workers)
        self.homes = [addresses[i * len(addresses) // count] for i in range(count)]

    @property
    def most(self) -> int:
        """The most stretches that are at home on one worker, and so share its memory."""
        return max(Counter(self.homes).values())

    def renew(self, workers: Mapping[str, int]) -> None:
        """Give the stretches of workers that are gone to those that have the fewest for their threads."""
        if not workers or set(self.homes) <= set(workers):
            return
        held = Counter(home for home in self.homes if home in workers)
        for i, home in enumerate(self.homes):
            if home not in workers:
                chosen = min(sorted(workers), key=lambda address: held[address] / workers[address])
                self.homes[i] = chosen
                held[chosen] += 1


def slots(workers: Mapping[str, int]) -> list[str]:
    """One address for each thread of each worker."""
    return [address for address in sorted(workers) for _ in range(workers[address])]
