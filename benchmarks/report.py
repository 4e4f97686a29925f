"""docs/benchmarks.md from the results: everything in it, numbers and words, is written anew by each run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks import bounds

Results = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One line of the table of targets; `met` is None where a measurement is missing."""

    text: str
    measured: str
    target: str
    met: bool | None


class Found:
    """The results with the look-ups that the tables need."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.cases: dict[str, Results] = {case["name"]: case for case in results["cases"]}

    def runs(self, name: str) -> list[Results]:
        """The successful repetitions; none where the case was not run or failed."""
        runs = self.cases[name]["runs"] if name in self.cases else []
        return [] if any("error" in run for run in runs) else runs

    def error(self, name: str) -> str | None:
        return next((run["error"] for run in self.cases[name]["runs"] if "error" in run), None)

    def totals(self, name: str, without: Iterable[str] = ()) -> list[float]:
        return [
            sum(s for stage, s in self._stages(name, run).items() if stage not in without) for run in self.runs(name)
        ]

    def total(self, name: str, without: Iterable[str] = ()) -> float | None:
        totals = self.totals(name, without)
        return statistics.median(totals) if totals else None

    def stages(self, name: str) -> dict[str, float]:
        runs = [self._stages(name, run) for run in self.runs(name)]
        return {stage: statistics.median(run[stage] for run in runs) for stage in (runs[0] if runs else {})}

    def fact(self, name: str, fact: str) -> Any:
        values = [run["facts"][fact] for run in self.runs(name) if fact in run["facts"]]
        return statistics.median(values) if values and not isinstance(values[0], str) else (values or [None])[0]

    def peak(self, name: str) -> float | None:
        return max((run["peak_mb"] for run in self.runs(name)), default=None)

    def fastest(self, prefix: str) -> str | None:
        """The case of this prefix that took least, so that a peer is compared at its best."""
        known = {name: self.total(name) for name in self.cases if name.startswith(prefix)}
        done = {name: seconds for name, seconds in known.items() if seconds is not None}
        return min(done, key=lambda name: done[name]) if done else None

    def _stages(self, name: str, run: Results) -> dict[str, float]:
        """Seconds of the stages; what was done for some right-hand sides only is extrapolated to all of them."""
        units = self.cases[name]["units"]
        scale = self.results["size"]["n_test"] / units if units else 1.0
        return {stage: s * (1.0 if stage == "gradients" else scale) for stage, s in run["stages"].items()}


def render(results: Results) -> str:
    """The whole page."""
    found = Found(results)
    parts = [
        _head(found),
        "## Targets\n\n" + _target_table(targets(found)),
        "## Times\n\n" + _time_table(found),
        _failures(found),
        "## How near to the exact scores\n\n" + _agreement(found),
        "## Against the limits of the machine\n\n" + _limits(found),
        _notes(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def targets(found: Found) -> list[Target]:
    """What was asked for and what was measured."""
    gram, sjlt, sketched = found.total("gram"), found.total("sjlt"), found.total("sketched")
    corrected, formed = found.total("corrected"), found.total("formed")
    agreement = found.fact("agreement", "largest")
    peak = found.peak("gram")
    peer_less = ("set-up",)
    lines = [
        Target(
            "Exact scores (Gram) and a dense float64 solve: largest difference relative to the largest score",
            _number(agreement, "{:.1e}"),
            "≤ 1e-8",
            None if agreement is None else agreement <= 1e-8,
        ),
        _ratio("Conjugate gradients ÷ exact scores", found.total("cg"), gram, 10),
        Target(
            "Exact scores, peak memory of the process",
            _number(peak, "{:,.0f} MB"),
            "< 2,500 MB",
            None if peak is None else peak < 2500,
        ),
        _best(found, "kronfluence EK-FAC ÷ exact scores", "ekfac-", gram, 3),
        _ratio("pyDVL inverse harmonic mean ÷ exact scores", found.total("harmonic"), gram, 3),
        _best(found, "dattri `normal` ÷ gradients and SJLT", "dattri-normal-", sjlt, 20),
        _best(found, "dattri `rademacher` ÷ gradients and SJLT", "dattri-rademacher-", sjlt, 20),
        _ratio(
            "scikit-learn SparseRandomProjection (without its set-up) ÷ gradients and SJLT",
            found.total("sklearn", peer_less),
            sjlt,
            5,
        ),
        _share("SJLT of formed gradients ÷ a copy of them (`clone()`)", formed, found.fact("formed", "clone")),
        _share("SJLT of formed gradients ÷ a copy into memory at hand (`copy_`)", formed, found.fact("formed", "copy")),
        _best(found, "dattri TRAKAttributor ÷ sketched scores as published", "trak-", sketched, 5),
        _best(found, "dattri TRAKAttributor ÷ sketched scores with corrected damping", "trak-", corrected, 5),
    ]
    return [line for line in lines if line.measured != "not measured" or len(found.cases) > 10]


def _best(found: Found, text: str, prefix: str, ours: float | None, target: float) -> Target:
    name = found.fastest(prefix)
    theirs = found.total(name) if name else None
    way = f" ({found.cases[name]['method'].split(', ', 1)[-1]})" if name else ""
    return _ratio(text + way, theirs, ours, target)


def _ratio(text: str, theirs: float | None, ours: float | None, target: float) -> Target:
    ratio = None if theirs is None or ours is None else theirs / ours
    return Target(text, _number(ratio, "{:.1f}×"), f"≥ {target:g}×", None if ratio is None else ratio >= target)


def _share(text: str, ours: float | None, bound: float | None) -> Target:
    share = None if ours is None or bound is None else ours / bound
    return Target(text, _number(share, "{:.2f}×"), "≤ 1×", None if share is None else share <= 1)


def _number(value: float | None, form: str) -> str:
    return "not measured" if value is None else form.format(value)


def _table(header: list[str], rows: Iterable[list[str]], align: str) -> str:
    rule = {"l": "---", "r": "---:"}
    lines = [header, [rule[letter] for letter in align], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _head(found: Found) -> str:
    results = found.results
    size, described = results["size"], results["machine"]
    facts = [
        ("Command", "`make bench`"),
        ("Date", described["date"]),
        ("Processor", f"{described['processor']}, {described['cores']} cores"),
        ("Memory", described["memory"]),
        ("System", described["system"]),
        ("Load before the start", described["load before"]),
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
        "Machines differ: read the ratios.\n\n" + _table(["", ""], [list(fact) for fact in facts], "ll")
    )


def _target_table(lines: list[Target]) -> str:
    said = {True: "met", False: "**missed**", None: "–"}
    return _table(
        ["what", "measured", "target", ""],
        [[line.text, line.measured, line.target, said[line.met]] for line in lines],
        "lrrl",
    )


def _time_table(found: Found) -> str:
    rows = []
    for name, case in found.cases.items():
        if case["item"] == "agreement":  # a check, not a timing
            continue
        totals = found.totals(name)
        if not totals:
            rows.append([case["library"], case["method"], "failed", "–", "–", "–", str(len(case["runs"]))])
            continue
        stages = ", ".join(f"{stage} {_seconds(s)}" for stage, s in found.stages(name).items())
        spread = f"{_seconds(min(totals))} to {_seconds(max(totals))}" if len(totals) > 1 else "–"
        extrapolated = " (extrapolated)" if case["units"] else ""
        rows.append(
            [
                case["library"],
                case["method"] + extrapolated,
                f"{_seconds(statistics.median(totals))}",
                spread,
                stages,
                f"{found.peak(name):,.0f}",
                str(len(totals)),
            ]
        )
    header = ["library", "method", "seconds", "least to most", "stages", "peak MB", "runs"]
    return _table(header, rows, "llrrlrr") + (
        "\n\nSeconds are medians over the runs and leave out starting Python, imports and loading the inputs. "
        "Peak MB is the whole process with its imports (some 300 to 600 MB before the work begins)."
    )


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _failures(found: Found) -> str:
    failed = [(case, found.error(name)) for name, case in found.cases.items()]
    lines = [f"- {case['library']}, {case['method']}: `{error}`" for case, error in failed if error]
    return "## What failed\n\n" + "\n".join(lines) if lines else ""


def _agreement(found: Found) -> str:
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
        return text + "No scores to compare in this run."
    header = ["library", "method", "Frobenius error", "largest error", "Spearman a test"]
    return (
        text
        + "On the task itself, against the exact damped scores under the empirical Fisher (the Gram route):\n\n"
        + _table(header, rows, "llrrr")
        + "\n\nThe Frobenius error is ‖scores − exact‖ / ‖exact‖, the largest error is relative to the largest exact "
        "score, and Spearman is the mean over tests of the rank correlation over train images. EK-FAC approximates the "
        "true Fisher, not the empirical one, and the inverse harmonic mean replaces the mean of the curvature by "
        "another mean: for them this is a distance between two definitions as much as an error. TRAK explains another "
        "output (the margin) in other units, so only its order is compared."
    )


def _limits(found: Found) -> str:
    rates = found.results["rates"].get("facts", {})
    size = found.results["size"]
    if not rates:
        return f"The rates could not be measured: `{found.results['rates'].get('error')}`"
    text = (
        f"Measured in the same run, {rates['threads']} threads: {rates['gflops_float32']:.0f} GFLOP/s for products of "
        f"{size['matrix']:,} × {size['matrix']:,} float32 matrices, {rates['gflops_float64']:.0f} for float64, "
        f"{rates['copy_gb_per_s']:.1f} GB/s for a copy into memory at hand (bytes read and written).\n\n"
    )
    work = bounds.gram_route(size["n_train"], size["n_test"])
    seconds = [step.gflop / rates[f"gflops_{step.dtype}"] for step in work]
    rows = [
        [step.step, f"`{step.formula}`", f"{step.gflop:.1f}", step.dtype, _seconds(least)]
        for step, least in zip(work, seconds, strict=True)
    ]
    rows.append(["**together**", "", f"{sum(step.gflop for step in work):.1f}", "", _seconds(sum(seconds))])
    text += _table(["exact scores", "count", "GFLOP", "precision", "seconds at the full rate"], rows, "llrlr")
    if gram := found.total("gram"):
        text += (
            f"\n\nThe route took {_seconds(gram)} s from end to end: {sum(seconds) / gram:.0%} of the time is "
            f"arithmetic "
            "at the full matrix rate, the rest is everything else (reading data, the passes through the network, "
            "symmetrising, memory traffic, and the lower rate of a Cholesky)."
        )
    if cg := found.fact("cg", "gflop_at_most"):
        solve = found.runs("cg")[0]["stages"]["solve"]
        text += (
            f" Conjugate gradients made {found.fact('cg', 'iterations'):.0f} iterations for "
            f"{found.fact('cg', 'tests'):.0f} right-hand sides, at most {cg:,.0f} GFLOP in {_seconds(solve)} s "
            f"({cg / solve:.0f} GFLOP/s), {found.fact('cg', 'restarts'):.0f} restarts, largest true relative residual "
            f"{found.fact('cg', 'relative_residual'):.1e}."
        )
    if formed := found.total("formed"):
        n, m = size["n_train"], size["m"]
        moved, copied = bounds.formed_bytes(n, m), bounds.copy_bytes(n)
        clone, copy = found.fact("formed", "clone"), found.fact("formed", "copy")
        bandwidth = moved / formed / 1e9
        text += (
            f"\n\nSJLT of formed gradients: {_seconds(formed)} s for at least {moved / 1e9:.2f} GB (every gradient "
            f"read, "
            f"every sketch written), {bandwidth:.1f} GB/s, {bandwidth / rates['copy_gb_per_s']:.0%} of the bandwidth "
            f"of a "
            f"copy. The copies in the same process move {copied / 1e9:.2f} GB: `clone()`, which also gets new memory "
            f"from "
            f"the system, {_seconds(clone)} s; `copy_` {_seconds(copy)} s. The first call, which also draws the hash, "
            f"took {_seconds(found.fact('formed', 'first call'))} s."
        )
    if sjlt := found.total("sjlt"):
        rows_per_second = size["n_train"] / sjlt
        text += (
            f" Fused with the making of the gradients it takes {_seconds(sjlt)} s, {rows_per_second:,.0f} rows a "
            f"second, "
            f"with a peak of {found.peak('sjlt'):,.0f} MB where the gradients alone would be "
            f"{4 * size['n_train'] * bounds.PARAMETERS / 1e6:,.0f} MB."
        )
    return text


def _notes(found: Found) -> str:
    size = found.results["size"]
    setup = found.stages("sklearn").get("set-up")
    setup_text = f" (here {_seconds(setup)} s)" if setup else ""
    notes = [
        "**Which peer time counts.** Where a peer has several ways (batch sizes, calls), each is measured and the "
        "ratio "
        "is with its fastest.",
        "**Conjugate gradients** are ours, in `benchmarks/workers/cg.py`, and meant to be good: products from the "
        "cached "
        "layer inputs and output gradients, all right-hand sides together, each leaving the batch when it has "
        "converged, "
        f"float32 with restarts from a float64 residual. {size['cg_tests']} tests are solved to a relative residual of "
        f"1e-6 and the time is scaled to {size['n_test']}; the cost of a right-hand side hardly depends on their "
        f"number "
        "at this width.",
        "**kronfluence** fits EK-FAC factors on labels sampled from the model (its default), with whole data sets as "
        "batches, as its example for small data does, and with batches of a tenth. It writes its factors and scores "
        "to a "
        "temporary folder, which its interface always does. Its declared torchvision is not installed; the measured "
        "calls do not import it.",
        "**pyDVL** is asked for `influence_factors` of the tests and then for `influences_from_factors`, which solves "
        "once; `influences` on whole data sets, or its chunked calculators, solve several times over. It declares "
        "numpy < 2 and runs here on the numpy above.",
        "**dattri** draws its projection matrix again for every batch, so it is measured with batches of a tenth of "
        "the "
        "data and with all data as one batch, as in its MNIST scripts. Its SJLT needs a GPU. TRAK's λ is converted to "
        "its units (gradients divided by √d, sums over rows).",
        "**Sketched scores** come in two kinds: as published, which is the algebra of TRAK, and with the damping "
        "corrected for the sketch (the default), which needs all eigenvalues of the m × m matrix.",
        f"**scikit-learn** builds a sparse matrix once{setup_text}; the ratio leaves that out, and the time of our own "
        "hash is in.",
        "**Exact** means exact for the empirical Fisher with the damping given; which curvature predicts retraining "
        "best "
        "is another question, which the timings do not answer.",
    ]
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in notes)
