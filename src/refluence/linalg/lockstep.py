"""Several algorithms on several maps, one after the other or together, so that one pass over the data serves all.

An algorithm is a generator: it yields the vectors V that it wants multiplied, and is sent C V.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import TypeVar

from torch import Tensor

from refluence.linalg.maps import Apply

Result = TypeVar("Result")
Steps = Generator[Tensor, Tensor, Result]


def run(steps: Steps[Result], apply: Apply) -> Result:
    """The result of an algorithm on one map."""
    try:
        wanted = next(steps)
        while True:
            wanted = steps.send(apply(wanted))
    except StopIteration as end:
        return end.value


def run_together(
    steps: Mapping[str, Steps[Result]], apply: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Result]:
    """The results of an algorithm for each block of a block-diagonal map, with one product for all that still run."""
    results: dict[str, Result] = {}
    products: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    while len(results) < len(steps):
        for block, algorithm in steps.items():
            if block in results:
                continue
            try:
                wanted[block] = algorithm.send(products[block]) if block in products else next(algorithm)
            except StopIteration as end:
                results[block] = end.value
                wanted.pop(block, None)
        products = apply(wanted) if wanted else {}
    return {block: results[block] for block in steps}
