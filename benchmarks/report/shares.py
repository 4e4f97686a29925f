"""Counted arithmetic of our routes, as a share of the rate of matrix products measured in the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import bounds
from benchmarks.case import Size
from benchmarks.report.found import Found, seconds, table
from benchmarks.report.inverses import NAMES
from refluence.solvers.conjugate_gradient import ENTRY_BYTES, TILE_BYTES

Count = Callable[[Found, str, int, int], float]
SAMPLES = 2


def _gram(found: Found, name: str, n: int, k: int) -> float:
    return sum(step.gflop for step in bounds.gram_route(n, k))


def _sampled(found: Found, name: str, n: int, k: int) -> float:
    return bounds.sampled_gram(n, k, SAMPLES)


def _conjugate(found: Found, name: str, n: int, k: int) -> float:
    case = found.cases[name]
    solver = case["options"]["solver"]["ConjugateGradient"]
    rank = next(iter(solver.get("preconditioner", {}).values()), {}).get("rank", 0)
    solved = case["units"] or k
    together = min(solved, TILE_BYTES // (ENTRY_BYTES * bounds.PARAMETERS)) if solver.get("block", True) else 0
    steps = found.fact(name, "column steps") * k / solved
    return bounds.conjugate_gradients(n, k, steps, together) + bounds.curvature_product(n, rank, bounds.CLASSES)


def _kronecker(found: Found, name: str, n: int, k: int) -> float:
    return bounds.kronecker(n, k, SAMPLES)


def _lissa(found: Found, name: str, n: int, k: int) -> float:
    options = found.cases[name]["options"]
    rows = bounds.CLASSES if options["curvature"] == "ggn" else 1
    batch = options["solver"]["Lissa"].get("batch_size", n)
    # one more product measures the residual
    return (
        bounds.curvature_product(batch, k * found.fact(name, "depth"), rows)
        + bounds.curvature_product(n, k, rows)
        + bounds.score_product(n, k)
    )


def _low_rank(found: Found, name: str, n: int, k: int) -> float:
    [arguments] = found.cases[name]["options"]["solver"].values()
    products = found.fact(name, "products") or arguments["rank"]
    return bounds.low_rank(n, k, products, arguments["rank"], bounds.CLASSES)


def _harmonic(found: Found, name: str, n: int, k: int) -> float:
    return bounds.harmonic(n, k)


COUNTS: dict[str, tuple[Count, str]] = {
    "gram": (_gram, "avoided: inner products of d_in + d_out numbers"),
    "gram-sampled": (_sampled, "avoided: inner products of d_in + d_out numbers"),
    "cg-block": (_conjugate, "made once for the scores, and for every pass"),
    "cg-nystroem": (_conjugate, "made once for the scores, and for every pass"),
    "cg-ekfac": (_conjugate, "made once for the scores, and for every pass"),
    "cg-columns": (_conjugate, "made once for the scores, and for every pass"),
    "kron": (_kronecker, "made once, in the eigenbasis"),
    "lissa-ggn": (_lissa, "made once for the scores, and a share of it every step"),
    "lissa-fisher": (_lissa, "made once for the scores, and a share of it every step"),
    "lissa-auto": (_lissa, "made once for the scores, and for every step"),
    "arnoldi-ggn": (_low_rank, "avoided: coordinates in the eigenvectors"),
    "nystroem-ggn": (_low_rank, "avoided: coordinates in the eigenvectors"),
    "harmonic": (_harmonic, "avoided: inner products of d_in + d_out numbers"),
}


def shares(found: Found) -> str:
    """The table of counted arithmetic."""
    rates: dict[str, Any] = found.results["rates"].get("facts", {})
    known = [name for name in COUNTS if found.total(name)]
    if not rates or not known:
        return ""
    size = Size(**found.results["size"])
    dense = bounds.score_product(size.n_train, size.n_test)
    rows = []
    for name in known:
        case, took = found.cases[name], found.total(name) or 0.0
        count, how = COUNTS[name]
        gflop = count(found, name, size.n_train, size.n_test)
        rows.append(
            [
                f"{case['method']}, {NAMES[case['curvature']]}" + (" (scaled)" if case["units"] else ""),
                f"{gflop:,.0f}",
                seconds(took),
                f"{gflop / took:,.0f}",
                *(f"{gflop / took / rates[f'gflops_{kind}']:.0%}" for kind in ("float32", "float64")),
                f"{dense / took:,.0f}",
                how,
            ]
        )
    least = (dense / rates["gflops_float32"], dense / rates["gflops_float64"])
    header = ["route of ours", "counted GFLOP", "seconds", "GFLOP/s", "of the float32 rate", "of the float64 rate"]
    header += ["dense product ÷ seconds, GFLOP/s", "the dense product"]
    return (
        "### Counted arithmetic\n\n"
        f"The product of {size.n_test:,} solved vectors with {size.n_train:,} gradients of {bounds.PARAMETERS:,} "
        f"numbers is {dense:,.0f} GFLOP, which at the full rate takes {seconds(least[0])} s in float32 and "
        f"{seconds(least[1])} s in float64. For each route the arithmetic that it counts (products with the curvature, "
        "recurrences, factorisations, scores; not the passes through the network nor eigenvectors), and the share of "
        "each rate that this is over its whole time. A rate above the machine's in the last but one column means that "
        "the structure avoids the dense product.\n\n" + table(header, rows, "lrrrrrrl")
    )
