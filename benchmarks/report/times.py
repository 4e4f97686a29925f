"""What was run on what, how long it took, and what failed."""

from __future__ import annotations

import statistics

from benchmarks import bounds
from benchmarks.report.found import INVERSES, Found, seconds, table


def head(found: Found) -> str:
    results = found.results
    size, described = results["size"], results["machine"]
    facts = [
        ("Command", "`make bench`"),
        ("Date", described["date"]),
        ("Processor", f"{described['processor']}, {described['cores']} cores"),
        ("Memory", described["memory"]),
        ("System", described["system"]),
        ("Load before the start", described["load before"]),
        ("Measured again, after the others", ", ".join(found.results.get("again", [])) or "nothing"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in results["versions"].items())),
        ("Length of the run", f"{results['minutes']:.0f} minutes"),
    ]
    small = "" if size["n_train"] == 5000 else " **These are tiny sizes that only show that everything runs.**"
    d_lambda = found.fact("gram", "effective_dimension")
    dimension = "" if d_lambda is None else f" The effective dimension at this damping is d_λ = {d_lambda:.1f}."
    return (
        "# Benchmarks\n\n"
        "Written by `make bench`, which installs the peers into an environment of their own, measures, and writes this "
        "page anew. Not edited by hand.\n\n"
        f"The task: the published MNIST network (784-128-64-10, {bounds.PARAMETERS:,} parameters), the first "
        f"{size['n_train']:,} train and {size['n_test']:,} test images, damping λ = {results['damping']:g}, "
        f"sketches of m = {size['m']:,} numbers, on the CPU.{small}{dimension} "
        "Every measurement is a process of its own; the repetitions of ours and of the peers alternate in one run. "
        "Machines differ: read the ratios.\n\n" + table(["", ""], [list(fact) for fact in facts], "ll")
    )


def time_section(found: Found) -> str:
    rows: list[list[str]] = []
    for name, case in found.cases.items():
        if case["item"] in ("agreement", *INVERSES):  # a check; cases with a table of their own
            continue
        totals = found.totals(name)
        if not totals:
            rows.append([case["library"], case["method"], "failed", "–", "–", "–", str(len(case["runs"]))])
            continue
        stages = ", ".join(f"{stage} {seconds(s)}" for stage, s in found.stages(name).items())
        spread = f"{seconds(min(totals))} to {seconds(max(totals))}" if len(totals) > 1 else "–"
        extrapolated = " (extrapolated)" if case["units"] else ""
        rows.append(
            [
                case["library"],
                case["method"] + extrapolated,
                f"{seconds(statistics.median(totals))}",
                spread,
                stages,
                f"{found.peak(name):,.0f}",
                str(len(totals)),
            ]
        )
    if not rows:
        return ""
    header = ["library", "method", "seconds", "least to most", "stages", "peak MB", "runs"]
    return (
        "## Times of the exact and the sketched routes\n\n"
        + table(header, rows, "llrrlrr")
        + (
            "\n\nSeconds are medians over the runs and leave out starting Python, imports and loading the inputs. "
            "Peak MB is the whole process with its imports (some 300 to 600 MB before the work begins)."
        )
    )


def failures(found: Found) -> str:
    failed = [(case, found.error(name)) for name, case in found.cases.items()]
    lines = [f"- {case['library']}, {case['method']}: `{error}`" for case, error in failed if error]
    return "## What failed\n\n" + "\n".join(lines) if lines else ""
