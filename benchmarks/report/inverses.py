"""The table of the inverses: time, memory and error of each solver beside its peers."""

from __future__ import annotations

from benchmarks.report.found import INVERSES, Found, seconds, table

TITLES = {
    "solve": "Conjugate gradients and the sampled Fisher",
    "ekfac": "EK-FAC",
    "lissa": "LiSSA",
    "arnoldi": "Arnoldi",
    "nystroem": "Nyström",
    "harmonic": "Harmonic mean (DataInf)",
}
NAMES = {
    "ggn": "GGN",
    "hessian": "Hessian",
    "fisher": "empirical Fisher",
    "mc_fisher": "true Fisher, sampled",
    "true_fisher": "true Fisher",
}


def inverses(found: Found) -> str:
    """One table for each kind of solver."""
    parts = []
    for item in INVERSES:
        names = found.of_item(item)
        if names:
            header = ["library", "method", "curvature", "tests", "fit s", "solve and scores s", "ms a test", "peak MB"]
            header += ["Frobenius error", "Spearman", "residual", "runs"]
            rows = [_row(found, name) for name in names]
            parts.append(f"### {TITLES[item]}\n\n" + table(header, rows, "lllrrrrrrrrr"))
    if not parts:
        return ""
    return "\n\n".join(["## Inverses", _preface(found), *parts])


def _preface(found: Found) -> str:
    size, reference = found.results["size"], found.results["reference"]
    checked = reference.get("facts", {}).get("residual")
    exact = (
        f"the reference's relative residual, by products that use nothing of this library, is {checked:.1e}"
        if checked is not None
        else f"the reference failed: `{reference.get('error')}`"
    )
    return (
        f"Scores of {size['n_test']:,} tests with {size['n_train']:,} train images. Where fewer tests were solved for, "
        "what is done for each test is scaled to all of them. The errors are against exact damped scores in float64 of "
        "the curvature that a method claims: the empirical Fisher's by the Gram route, the GGN's (which is the true "
        "Fisher of this loss) by conjugate gradients to 1e-6; "
        f"{exact}. The Hessian is compared with the GGN, because it may be indefinite, and exact scores under it then "
        f"mean little. Spearman is over the {reference.get('facts', {}).get('unsure', 0):,} tests whose label has a "
        "probability of at most 1 - 1e-5: in float32 the gradient of the others is little but rounding. ms a test is "
        "fit, solve and scores together over the number of tests. The residual is "
        "‖(C + λI)s − g‖/‖g‖: the largest of the columns as our solvers measure it, and for the peers of some tests "
        "together, measured here on the curvature that they claim. EK-FAC and low rank approximate; their error is "
        "that of the method as much as of the program."
    )


def _row(found: Found, name: str) -> list[str]:
    case = found.cases[name]
    tests = str(case["units"] or found.results["size"]["n_test"])
    shown = [case["library"], case["method"], NAMES.get(case["curvature"], case["curvature"]), tests]
    total = found.total(name)
    if total is None:
        return [*shown, "failed", *["–"] * 6, str(len(case["runs"]))]
    fit = found.stages(name).get("fit", 0.0)
    rest = found.total(name, without=("fit",))
    residual = found.fact(name, "residual")
    return [
        *shown,
        seconds(fit),
        seconds(rest),
        f"{1000 * total / found.results['size']['n_test']:,.3g}",
        f"{found.peak(name):,.0f}",
        *_errors(found, name),
        "–" if residual is None else f"{residual:.1e}",
        str(len(found.runs(name))),
    ]


def _errors(found: Found, name: str) -> list[str]:
    compared = found.compared(name)
    if "error" in compared:
        return [compared["error"], "–"]
    if not compared:
        return ["–", "–"]
    return [f"{compared['frobenius']:.2g}", f"{compared['spearman']:.4f}"]
