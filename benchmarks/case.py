"""What a case is: a worker, its options and how often it runs; and how large the problem is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Size:
    """How large the problem is.

    `cg_tests`, `some` and `few` are the tests of methods that take seconds for each of them.
    """

    n_train: int
    n_test: int
    m: int
    cg_tests: int
    some: int
    few: int
    matrix: int
    numbers: int


FULL = Size(n_train=5000, n_test=500, m=4096, cg_tests=50, some=20, few=5, matrix=3000, numbers=250_000_000)
QUICK = Size(n_train=200, n_test=20, m=256, cg_tests=5, some=4, few=2, matrix=500, numbers=1_000_000)


@dataclass(frozen=True)
class Case:
    """One measured thing.

    Attributes:
        name: unique; the key of its results.
        item: what `--only` selects it by.
        library: whose code is measured.
        method: what it does, as the report says it.
        worker: the module that measures it.
        options: what the worker is told.
        repetitions: fresh processes; the report takes the median.
        scores: what its saved scores can be compared by: the values, their order only, or nothing.
        reference: the curvature whose exact damped scores they are compared with: the one that it claims, and the
            generalised Gauss-Newton ("ggn") for the Hessian, which is indefinite here.
        curvature: the one that it works on, as the report says it.
        timeout: seconds after which a repetition is given up.
        units: right-hand sides it solved, where fewer than the test rows: its cost is extrapolated.
    """

    name: str
    item: str
    library: str
    method: str
    worker: str
    options: dict[str, Any]
    repetitions: int = 3
    scores: Literal["values", "order", "none"] = "none"
    reference: Literal["fisher", "ggn"] = "fisher"
    curvature: str = ""
    timeout: float = 600
    units: int | None = None
