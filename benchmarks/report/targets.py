"""What was asked for next to what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.report.found import Found, number, table

CONJUGATE = ("cg-block", "cg-nystroem", "cg-ekfac")


@dataclass(frozen=True)
class Target:
    """One line of the table of targets; `met` is None where a measurement is missing."""

    text: str
    measured: str
    target: str
    met: bool | None


def target_section(found: Found) -> str:
    """The table of targets."""
    lines = [*_routes(found), *_inverses(found)]
    known = [line for line in lines if line.measured != "not measured" or len(found.cases) > 20]
    return (
        "## Targets\n\n"
        + _target_table(known)
        + (
            "\n\nIn brackets the Frobenius errors of the scores, the peer's and then ours, against the exact damped "
            "scores of the curvature that each claims (of the GGN for the Hessian)."
            if known
            else ""
        )
    )


def _routes(found: Found) -> list[Target]:
    """The exact and the sketched routes."""
    gram, sjlt, sketched = found.total("gram"), found.total("sjlt"), found.total("sketched")
    corrected, formed = found.total("corrected"), found.total("formed")
    agreement = found.fact("agreement", "largest")
    peak = found.peak("gram")
    peer_less = ("set-up",)
    return [
        Target(
            "Exact scores (Gram) and a dense float64 solve: largest difference relative to the largest score",
            number(agreement, "{:.1e}"),
            "≤ 1e-8",
            None if agreement is None else agreement <= 1e-8,
        ),
        _ratio("Conjugate gradients ÷ exact scores", found.total("cg"), gram, 10),
        Target(
            "Exact scores, peak memory of the process",
            number(peak, "{:,.0f} MB"),
            "< 2,500 MB",
            None if peak is None else peak < 2500,
        ),
        _best(found, "kronfluence EK-FAC ÷ exact scores", "kronfluence-", gram, 3),
        _ratio("pyDVL inverse harmonic mean ÷ exact scores", found.total("pydvl-harmonic"), gram, 3),
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
        _ratio(
            "dattri LoGra ÷ Kronecker sketches of the same size, as published",
            found.total("logra"),
            found.total("kronecker-published"),
            1,
        ),
    ]


def _inverses(found: Found) -> list[Target]:
    """Each solver of ours against the peers that have it."""
    cg = _fastest(found, CONJUGATE)
    kron_fit = found.stages("kron").get("fit")
    kronfluence = [name for name in found.cases if name.startswith("kronfluence-") and found.runs(name)]
    fits = [found.stages(name)["fit"] for name in kronfluence]
    return [
        _against(found, "pyDVL CG, its faster way ÷ CG", _fastest(found, _named(found, "pydvl-cg")), cg, 5),
        _against(found, "pyDVL block CG ÷ CG", "pydvl-cg-block", cg, 10),
        _against(found, "dattri CG, its faster way ÷ CG", _fastest(found, _named(found, "dattri-cg")), cg, 10),
        _ratio("kronfluence EK-FAC fit ÷ EK-FAC fit", min(fits, default=None), kron_fit, 20),
        _against(found, "kronfluence EK-FAC ÷ EK-FAC", found.fastest("kronfluence-"), "kron", 3),
        _against(found, "pyDVL EK-FAC ÷ EK-FAC", "pydvl-ekfac", "kron", 2),
        _against(
            found, "pyDVL LiSSA ÷ LiSSA, same settings, GGN for the Hessian", "pydvl-lissa-hessian", "lissa-ggn", 3
        ),
        _against(
            found, "pyDVL LiSSA ÷ LiSSA, same settings, empirical Fisher", "pydvl-lissa-fisher", "lissa-fisher", 3
        ),
        _against(
            found, "pyDVL LiSSA ÷ LiSSA as it sets itself, empirical Fisher", "pydvl-lissa-fisher", "lissa-auto", 3
        ),
        _against(found, "pyDVL Arnoldi ÷ Arnoldi, both on the Hessian", "pydvl-arnoldi", "arnoldi-hessian", 3),
        _against(found, "pyDVL Arnoldi ÷ Arnoldi, GGN for the Hessian", "pydvl-arnoldi", "arnoldi-ggn", 3),
        _against(found, "pyDVL Nyström ÷ Nyström, GGN for the Hessian", "pydvl-nystroem", "nystroem-ggn", 3),
        _against(found, "pyDVL harmonic mean ÷ harmonic mean", "pydvl-harmonic", "harmonic", 3),
    ]


def _named(found: Found, prefix: str) -> tuple[str, ...]:
    return tuple(name for name in found.cases if name.startswith(prefix))


def _fastest(found: Found, names: tuple[str, ...]) -> str | None:
    done = {name: seconds for name in names if (seconds := found.total(name)) is not None}
    return min(done, key=lambda name: done[name]) if done else None


def _against(found: Found, text: str, theirs: str | None, ours: str | None, target: float) -> Target:
    """The ratio of the times for all tests, with what each bought for it."""
    if theirs is None or ours is None:
        return _ratio(text, None, None, target)
    errors = ", ".join(number(found.compared(name).get("frobenius"), "{:.2g}") for name in (theirs, ours))
    return _ratio(f"{text} ({errors})", found.total(theirs), found.total(ours), target)


def _best(found: Found, text: str, prefix: str, ours: float | None, target: float) -> Target:
    name = found.fastest(prefix)
    theirs = found.total(name) if name else None
    way = f" ({found.cases[name]['method'].split(', ', 1)[-1]})" if name else ""
    return _ratio(text + way, theirs, ours, target)


def _ratio(text: str, theirs: float | None, ours: float | None, target: float) -> Target:
    ratio = None if theirs is None or ours is None else theirs / ours
    return Target(text, number(ratio, "{:.1f}×"), f"≥ {target:g}×", None if ratio is None else ratio >= target)


def _share(text: str, ours: float | None, bound: float | None) -> Target:
    share = None if ours is None or bound is None else ours / bound
    return Target(text, number(share, "{:.2f}×"), "≤ 1×", None if share is None else share <= 1)


def _target_table(lines: list[Target]) -> str:
    said = {True: "met", False: "**missed**", None: "–"}
    return table(
        ["what", "measured", "target", ""],
        [[line.text, line.measured, line.target, said[line.met]] for line in lines],
        "lrrl",
    )
