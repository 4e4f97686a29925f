"""What is measured: one table of cases."""

from __future__ import annotations

from benchmarks.case import QUICK, Case, Size
from benchmarks.inverse_cases import inverse_cases

ITEMS = (
    *("gram", "cg", "ekfac", "harmonic", "sketch", "formed", "route", "factored", "agreement"),
    *("solve", "lissa", "arnoldi", "nystroem", "leverage"),
)


def cases(size: Size, damping: float) -> list[Case]:
    """Every case, peers next to the case of ours that they are compared with."""
    ours, workers = "refluence", "benchmarks.workers"
    table = [
        Case(
            "gram",
            "gram",
            ours,
            "exact scores, Gram",
            f"{workers}.attribution",
            {"damping": damping, "curvature": "fisher", "solver": {"Gram": {}}, "dimension": True},
            curvature="fisher",
        ),
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
        # it draws its projection matrix anew for every batch, so that smaller ones take longer
        for kind, batch in (("normal", size.n_train), ("rademacher", size.n_train))
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
    table.append(
        Case(
            f"trak-{size.n_train}",
            "route",
            "dattri",
            f"TRAKAttributor, batches of {size.n_train:,}",
            f"{workers}.dattri_trak",
            {"m": size.m, "batch": size.n_train, "damping": damping},
            repetitions=1,
            scores="order",
        )
    )
    table.extend(factored_cases(size, damping))
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
    leverage = Case(
        "leverage",
        "leverage",
        ours,
        "leverage scores, XᵀX and SVD in turns",
        f"{workers}.leverage",
        {"quick": size == QUICK},
        repetitions=1,
        timeout=1800,
    )
    return [*table, *inverse_cases(size, damping), leverage]


def factored_cases(size: Size, damping: float) -> list[Case]:
    """Sketches of both factors of every layer, each to 32 numbers and so to 1,024 a layer, and one block a layer."""
    workers, side = "benchmarks.workers", 32
    sketches = {
        "kronecker": ("Kronecker", {"m_a": side, "m_e": side}),
        "tensor": ("TensorSketch", {"m": side**2}),
        "sjlt": ("SJLT", {"m": side**2}),
    }
    projections = [
        Case(
            f"layers-{name}",
            "factored",
            "refluence",
            f"gradients of every layer and {kind} to {side**2:,} numbers",
            f"{workers}.factored_projection",
            {"sketch": {kind: arguments}},
        )
        for name, (kind, arguments) in sketches.items()
    ]
    scored = [
        Case(
            f"kronecker-{'corrected' if corrected else 'published'}",
            "factored",
            "refluence",
            f"layer by layer, Kronecker to {side**2:,} numbers, "
            + ("damping corrected for the sketch" if corrected else "as published"),
            f"{workers}.kronecker",
            {"m_a": side, "m_e": side, "damping": damping, "corrected": corrected},
            scores="values",
        )
        for corrected in (False, True)
    ]
    logra = Case(
        "logra",
        "factored",
        "dattri",
        f"LoGraAttributor, {side**2:,} numbers a layer",
        f"{workers}.dattri_logra",
        {"size": side**2, "batch": size.n_train, "relative": 1e-5},
        scores="order",
    )
    return [*projections, *scored, logra]
