"""What is measured: one table of cases. A case is a worker, its options and how often it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

ITEMS = ("gram", "cg", "ekfac", "harmonic", "sketch", "formed", "route", "agreement")


@dataclass(frozen=True)
class Size:
    """How large the problem is."""

    n_train: int
    n_test: int
    m: int
    cg_tests: int
    matrix: int
    numbers: int


FULL = Size(n_train=5000, n_test=500, m=4096, cg_tests=50, matrix=3000, numbers=250_000_000)
QUICK = Size(n_train=200, n_test=20, m=256, cg_tests=5, matrix=500, numbers=1_000_000)


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
    timeout: float = 600
    units: int | None = None


def cases(size: Size, damping: float) -> list[Case]:
    """Every case, peers next to the case of ours that they are compared with."""
    ours, workers = "refluence", "benchmarks.workers"
    # dattri draws its projection matrix anew for every batch; 5,000 is the batch of its own MNIST scripts
    dattri_batches = (size.n_train // 10, size.n_train)
    table = [
        Case("gram", "gram", ours, "exact scores, Gram", f"{workers}.gram", {"damping": damping}, scores="values"),
        Case(
            "cg",
            "cg",
            "benchmarks/workers/cg.py",
            "conjugate gradients to 1e-6",
            f"{workers}.cg",
            {"damping": damping, "tests": size.cg_tests, "tolerance": 1e-6, "maximum": 5000},
            repetitions=1,
            scores="values",
            timeout=900,
            units=size.cg_tests,
        ),
        Case(
            "ekfac",
            "ekfac",
            "kronfluence",
            "EK-FAC",
            f"{workers}.kronfluence_ekfac",
            {"damping": damping, "batch": size.n_train},
            scores="values",
        ),
    ]
    for by_factors in (False, True):
        way = "influence_factors" if by_factors else "influences"
        table.append(
            Case(
                f"harmonic-{way}",
                "harmonic",
                "pyDVL",
                f"inverse harmonic mean, `{way}`",
                f"{workers}.pydvl_harmonic",
                {"damping": damping, "batch": min(500, size.n_train), "by_factors": by_factors},
                scores="values",
            )
        )
    table.append(Case("sjlt", "sketch", ours, "gradients and SJLT", f"{workers}.sjlt_fused", {"m": size.m}))
    table.append(
        Case(
            "sklearn",
            "sketch",
            "scikit-learn",
            "vmap gradients and SparseRandomProjection",
            f"{workers}.sklearn_projection",
            {"m": size.m, "batch": min(1000, size.n_train)},
        )
    )
    table.extend(
        Case(
            f"dattri-{kind}-{batch}",
            "sketch",
            "dattri",
            f"vmap gradients and `{kind}`, batches of {batch:,}",
            f"{workers}.dattri_projection",
            {"m": size.m, "batch": batch, "kind": kind},
            repetitions=1,
        )
        for kind in ("normal", "rademacher")
        for batch in dattri_batches
    )
    table.append(Case("formed", "formed", ours, "SJLT of formed gradients", f"{workers}.sjlt_formed", {"m": size.m}))
    table.append(
        Case(
            "sketched",
            "route",
            ours,
            "sketched scores, SJLT",
            f"{workers}.sketched",
            {"m": size.m, "damping": damping},
            scores="values",
        )
    )
    table.extend(
        Case(
            f"trak-{batch}",
            "route",
            "dattri",
            f"TRAKAttributor, batches of {batch:,}",
            f"{workers}.dattri_trak",
            {"m": size.m, "batch": batch, "damping": damping},
            repetitions=1,
            scores="order",
        )
        for batch in dattri_batches
    )
    table.append(
        Case(
            "agreement",
            "agreement",
            ours,
            "Gram route and dense float64 solve, small network",
            f"{workers}.agreement",
            {"damping": damping},
            repetitions=1,
        )
    )
    return table
