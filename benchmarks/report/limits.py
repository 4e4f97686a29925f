"""What the exact route and the sketch do against what the machine can do."""

from __future__ import annotations

from benchmarks import bounds
from benchmarks.report.found import Found, seconds, table

TITLE = "## Against the limits of the machine\n\n"


def limits(found: Found) -> str:
    rates = found.results["rates"].get("facts", {})
    size = found.results["size"]
    if not rates:
        return f"{TITLE}The rates could not be measured: `{found.results['rates'].get('error')}`"
    text = TITLE + (
        f"Measured in the same run, {rates['threads']} threads: {rates['gflops_float32']:.0f} GFLOP/s for products of "
        f"{size['matrix']:,} × {size['matrix']:,} float32 matrices, {rates['gflops_float64']:.0f} for float64, "
        f"{rates['copy_gb_per_s']:.1f} GB/s for a copy into memory at hand (bytes read and written).\n\n"
    )
    work = bounds.gram_route(size["n_train"], size["n_test"])
    least = [step.gflop / rates[f"gflops_{step.dtype}"] for step in work]
    rows = [
        [step.step, f"`{step.formula}`", f"{step.gflop:.1f}", step.dtype, seconds(bound)]
        for step, bound in zip(work, least, strict=True)
    ]
    rows.append(["**together**", "", f"{sum(step.gflop for step in work):.1f}", "", seconds(sum(least))])
    text += table(["exact scores", "count", "GFLOP", "precision", "seconds at the full rate"], rows, "llrlr")
    if gram := found.total("gram"):
        text += (
            f"\n\nThe route took {seconds(gram)} s from end to end: {sum(least) / gram:.0%} of the time is "
            f"arithmetic "
            "at the full matrix rate, the rest is everything else (reading data, the passes through the network, "
            "symmetrising, memory traffic, and the lower rate of a Cholesky)."
        )
    if cg := found.fact("cg", "gflop_at_most"):
        solve = found.runs("cg")[0]["stages"]["solve"]
        text += (
            f" Conjugate gradients made {found.fact('cg', 'iterations'):.0f} iterations for "
            f"{found.fact('cg', 'tests'):.0f} right-hand sides, at most {cg:,.0f} GFLOP in {seconds(solve)} s "
            f"({cg / solve:.0f} GFLOP/s), {found.fact('cg', 'restarts'):.0f} restarts, largest true relative residual "
            f"{found.fact('cg', 'relative_residual'):.1e}."
        )
    if formed := found.total("formed"):
        n, m = size["n_train"], size["m"]
        moved, copied = bounds.formed_bytes(n, m), bounds.copy_bytes(n)
        clone, copy = found.fact("formed", "clone"), found.fact("formed", "copy")
        bandwidth = moved / formed / 1e9
        text += (
            f"\n\nSJLT of formed gradients: {seconds(formed)} s for at least {moved / 1e9:.2f} GB (every gradient "
            f"read, "
            f"every sketch written), {bandwidth:.1f} GB/s, {bandwidth / rates['copy_gb_per_s']:.0%} of the bandwidth "
            f"of a "
            f"copy. The copies in the same process move {copied / 1e9:.2f} GB: `clone()`, which also gets new memory "
            f"from "
            f"the system, {seconds(clone)} s; `copy_` {seconds(copy)} s. The first call, which also draws the hash, "
            f"took {seconds(found.fact('formed', 'first call'))} s."
        )
    if sjlt := found.total("sjlt"):
        rows_per_second = size["n_train"] / sjlt
        text += (
            f" Fused with the making of the gradients it takes {seconds(sjlt)} s, {rows_per_second:,.0f} rows a "
            f"second, "
            f"with a peak of {found.peak('sjlt'):,.0f} MB where the gradients alone would be "
            f"{4 * size['n_train'] * bounds.PARAMETERS / 1e6:,.0f} MB."
        )
    return text
