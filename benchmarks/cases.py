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
            "this benchmark",
            "conjugate gradients to 1e-6",
            f"{workers}.cg",
            {"damping": damping, "tests": size.cg_tests, "tolerance": 1e-6, "maximum": 5000},
            repetitions=1,
            scores="values",
            timeout=900,
            units=size.cg_tests,
        ),
    ]
    # its examples of this size take all data as one batch; smaller ones can be faster
    table.extend(
        Case(
            f"ekfac-{batch}",
            "ekfac",
            "kronfluence",
            f"EK-FAC, batches of {batch:,}",
            f"{workers}.kronfluence_ekfac",
            {"damping": damping, "batch": batch},
            scores="values",
        )
        for batch in (size.n_train // 10, size.n_train)
    )
    table.append(
        Case(
            "harmonic",
            "harmonic",
            "pyDVL",
            "inverse harmonic mean",
            f"{workers}.pydvl_harmonic",
            {"damping": damping, "batch": size.n_train // 10},
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
            {"m": size.m, "batch": size.n_train // 20},
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
        # rademacher takes longer still in small batches; the ratio is with the fastest
        for kind, batch in (*(("normal", batch) for batch in dattri_batches), ("rademacher", size.n_train))
    )
    table.append(Case("formed", "formed", ours, "SJLT of formed gradients", f"{workers}.sjlt_formed", {"m": size.m}))
    table.extend(
        Case(
            "corrected" if corrected else "sketched",
            "route",
            ours,
            "sketched scores, SJLT, " + ("damping corrected for the sketch" if corrected else "as published"),
            f"{workers}.sketched",
            {"m": size.m, "damping": damping, "corrected": corrected},
            scores="values",
        )
        for corrected in (False, True)
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
