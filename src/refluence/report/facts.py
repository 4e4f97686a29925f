"""The facts at the top of the page: what was computed, and how far it can be trusted, in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from refluence.gradients.coverage import KINDS
from refluence.influence import Influence
from refluence.report.diagnostics import NEGATIVE, RESIDUAL, findings
from refluence.report.formatting import count, number, percent, shorten
from refluence.scores import Scores
from refluence.skipping import sentence
from refluence.task import Task

Tone = Literal["plain", "good", "caution"]

# Shares of the root mean square gradient norm of an example.
STATIONARY = 1e-2
NEARLY_STATIONARY = 1e-1
MAX_COVERAGE_ROWS = 200

CURVATURES = {
    "fisher": "empirical Fisher",
    "ggn": "generalised Gauss–Newton matrix",
    "hessian": "Hessian",
    "true_fisher": "true Fisher",
    "mc_fisher": "sampled Fisher ({samples} an example)",
}
SOLVERS = {
    "Arnoldi": "the eigenpairs of largest magnitude",
    "ConjugateGradient": "conjugate gradients",
    "Dense": "the whole matrix",
    "Ekfac": "Kronecker factors of each layer, eigenvalues measured (EK-FAC)",
    "Gram": "inner products of gradients",
    "HarmonicMean": "mean of the inverses of single gradients (DataInf)",
    "Identity": "gradient dot products, no curvature",
    "Kfac": "Kronecker factors of each layer (K-FAC)",
    "Lissa": "a truncated Neumann series (LiSSA)",
    "Nystroem": "a random low-rank approximation (Nyström)",
    "Sketched": "randomly projected gradients",
}


@dataclass(frozen=True)
class Fact:
    """One tile of the facts band."""

    name: str
    value: str
    reading: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Measured:
    """What the scores explain: `noun` as in "the loss would rise", `sentence` for the facts band."""

    noun: str
    sentence: str


@dataclass(frozen=True)
class CoverageRow:
    """One parameter of the model, attributed or not."""

    parameter: str
    numel: int
    kind: str
    attributed: bool
    reason: str


def measured(task: Task) -> Measured:
    """The measurement of a task in words."""
    match task.measurement:
        case None | "loss":
            return Measured("loss", "the loss on each test example; lower is better")
        case "margin":
            return Measured("negative margin", "−log p/(1−p) of the label's class; lower is better")
        case "logit":
            return Measured("negative logit", "minus the logit of the label's class; lower is better")
        case other:
            name = shorten(getattr(other, "__name__", type(other).__name__), 40)
            return Measured("measurement", f"the task's own “{name}”, read as lower is better")


def facts(influence: Influence, scores: Scores) -> tuple[Fact, ...]:
    """The facts band of a fit and its scores: what was computed."""
    return (
        _coverage(influence),
        Fact("Training examples", f"{influence.n_train:,}", "each one can be named as helpful or harmful"),
        *_left_out(influence),
        _exactness(influence, scores),
        *(fact for fact in _diagnostics(influence) if fact.name not in (RESIDUAL, NEGATIVE)),
        Fact("Explains", measured(influence.task).noun, measured(influence.task).sentence),
    )


def grounds(influence: Influence) -> tuple[Fact, ...]:
    """What trust in the scores rests on beside checks against reality, each said also where it is not known."""
    reported = {fact.name: fact for fact in _diagnostics(influence)}
    return (
        _convergence(influence.gradient_norm, influence.gradient_rms),
        reported.get(RESIDUAL, _no_residual(influence)),
        _damping(influence.damping, influence.task.l2),
        _dimension(influence),
        reported.get(NEGATIVE, _no_negative(influence)),
    )


def coverage_rows(influence: Influence) -> tuple[tuple[CoverageRow, ...], int]:
    """The parameters with how each is attributed (at most 200), and how many there are."""
    frame = influence.coverage.frame()
    rows = tuple(
        CoverageRow(
            shorten(str(row["parameter"]), 120),
            int(row["numel"]),
            shorten(_text(row["kind"]), 40),
            bool(row["attributed"]),
            shorten(_text(row["reason"]), 200),
        )
        for row in frame.head(MAX_COVERAGE_ROWS).to_dict("records")
    )
    return rows, len(frame)


def _text(value: Any) -> str:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def _coverage(influence: Influence) -> Fact:
    coverage = influence.coverage
    by_kind = ", ".join(f"{numel:,} by {KINDS.get(kind, kind)}" for kind, numel in coverage.by_kind.items())
    if coverage.attributed == coverage.total:
        return Fact("Parameters attributed", f"all {coverage.total:,}", by_kind, "good")
    share = percent(coverage.attributed / coverage.total)
    return Fact(
        "Parameters attributed", f"{coverage.attributed:,} of {coverage.total:,}", f"{share}; {by_kind}", "caution"
    )


def _left_out(influence: Influence) -> Iterator[Fact]:
    if influence.skipped:
        reading = f"{shorten(sentence(influence.skipped, influence.n_train), 300)}; their scores are 0"
        yield Fact("Examples left out", f"{len(influence.skipped):,}", reading, "caution")


def _exactness(influence: Influence, scores: Scores) -> Fact:
    name = shorten(influence.plan.solver, 60)
    kind = type(influence.plan.chosen.solver).__name__
    matrix = CURVATURES[influence.curvature].format(samples=count(influence.settings.samples, "label"))
    how = f"{SOLVERS.get(kind, kind)}, on the {matrix}: "
    if scores.error is not None:
        sampled = influence.exact and influence.curvature == "mc_fisher"
        what = "exact but for the sampled labels" if sampled else "approximate"
        return Fact("Solver", name, f"{how}{what}, each score has a 95 % interval")
    if influence.exact and influence.curvature == "mc_fisher":
        return Fact("Solver", name, f"{how}one sampled label has no error bar; draw two or more", "caution")
    if influence.exact:
        return Fact("Solver", name, f"{how}exact for this damping", "good")
    if "residual" in influence.diagnostics:
        return Fact("Solver", name, f"{how}exact up to the relative residual")
    return Fact("Solver", name, f"{how}approximate, without error bars; certify measures how far off it is", "caution")


def _no_residual(influence: Influence) -> Fact:
    if influence.exact:
        return Fact(RESIDUAL, "none", "solved directly, without iterations")
    return Fact(RESIDUAL, "not known", "the solver is an approximation that does not measure it")


def _no_negative(influence: Influence) -> Fact:
    if influence.curvature != "hessian":
        return Fact(NEGATIVE, "none", "this curvature has none by its definition")
    if "negative_eigenvalues" in influence.diagnostics:
        return Fact(NEGATIVE, "none", "none was found")
    return Fact(NEGATIVE, "not known", "this solver does not look for them")


def _diagnostics(influence: Influence) -> Iterator[Fact]:
    for found in findings(influence.diagnostics):
        yield Fact(found.name, found.value, found.reading, "caution" if found.caution else "plain")


def _damping(damping: float | Mapping[str, float], l2: float) -> Fact:
    if isinstance(damping, Mapping):
        low, high = min(damping.values()), max(damping.values())
        return Fact("Damping λ", f"{number(low)} to {number(high)}", f"over {count(len(damping), 'block')}")
    reading = "directions of lower curvature than this are held back" if damping > 0 else "none"
    if l2 > 0:
        reading = f"with l2 = {number(l2)} of the training on top" if damping > 0 else f"l2 = {number(l2)} is enough"
    return Fact("Damping λ", f"{float(damping):.3g}".replace("e-0", "e-"), reading)


def _dimension(influence: Influence) -> Fact:
    name = "Effective dimension"
    w = influence.plan.workload
    dimension = influence.effective_dimension
    most = sum(d if w.q is None else min(d, w.n * w.q) for d in w.dimensions.values())
    if not math.isfinite(dimension):
        return Fact(name, "—", "not defined for this solver")
    return Fact(name, number(dimension), f"directions that the data determine, of at most {most:,}")


def _convergence(norm: float, typical: float) -> Fact:
    """The gradient of the objective, against that of a typical training example."""
    name, share = "Gradient at the model", norm / typical if typical > 0 else 0.0
    scale = f"{100 * share:.2g} % of a typical example's"
    if share <= STATIONARY:
        return Fact(name, number(norm), f"{scale}: converged; scores assume that training stands still", "good")
    if share <= NEARLY_STATIONARY:
        return Fact(name, number(norm), f"{scale}: nearly converged; scores assume that training stands still")
    reading = f"{scale}: not converged; scores assume that training stands still, so read them as directions"
    return Fact(name, number(norm), reading, "caution")
