"""How near the routes that are not inverses by another name come to the exact scores."""

from __future__ import annotations

from benchmarks.report.found import INVERSES, Found, table


def agreement(found: Found) -> str:
    small = found.runs("agreement")
    text = ""
    if small:
        facts = small[0]["facts"]
        text = (
            f"On a network of {facts['parameters']:,} parameters in float64 ({facts['train']:,} train and "
            f"{facts['tests']:,} test images of 10 × 10 pixels) the Gram route and a Cholesky solve of the dense "
            f"{facts['parameters']:,} × {facts['parameters']:,} matrix F + λI differ by {facts['largest']:.1e} of the "
            f"largest score, {facts['largest_row']:.1e} of the largest score of the same test, and "
            f"{facts['frobenius']:.1e} in the Frobenius norm.\n\n"
        )
    rows = []
    for name, compared in found.results["compared"].items():
        case = found.cases[name]
        if case["item"] in INVERSES:
            continue
        if "error" in compared:
            rows.append([case["library"], case["method"], "–", "–", compared["error"]])
            continue
        values = case["scores"] == "values"
        rows.append(
            [
                case["library"],
                case["method"],
                f"{compared['frobenius']:.2g}" if values else "–",
                f"{compared['largest']:.2g}" if values else "–",
                f"{compared['spearman']:.4f}",
            ]
        )
    if not rows:
        return "## How near to the exact scores\n\n" + text if text else ""
    header = ["library", "method", "Frobenius error", "largest error", "Spearman a test"]
    return (
        "## How near to the exact scores\n\n"
        + text
        + "On the task itself, against the exact damped scores under the empirical Fisher (the Gram route):\n\n"
        + table(header, rows, "llrrr")
        + "\n\nThe Frobenius error is ‖scores − exact‖ / ‖exact‖, the largest error is relative to the largest exact "
        "score, and Spearman is the mean over tests (as above) of the rank correlation over train images. TRAK "
        "explains another output (the margin) in other units, so only its order is compared."
    )
