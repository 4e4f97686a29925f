"""What is printed when a command is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refluence.cli.explanation import Explanation
from refluence.cli.output_folder import OutputFolder
from refluence.report.diagnostics import findings
from refluence.skipping import sentence

if TYPE_CHECKING:
    from refluence import Influence
    from refluence.cli.evaluation import Evaluation

MAX_ROWS = 12
NOT_VERIFIED = "not verified; --verify 8 really removes eight train rows and compares"


def print_explanation(console: Console, explanation: Explanation, top: pd.DataFrame) -> None:
    """What was computed and how, and the first of the train rows on both sides for up to twelve test rows."""
    console.print(_facts(explanation))
    console.print(_strongest(top))


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """The value of every metric for every method, what it means, and what was left out."""
    table = Table(title=escape(f"evaluation: {evaluation.problem.title}"), title_justify="left")
    for column in ("metric", "method", "value", "95 % interval"):
        table.add_column(column, overflow="fold")
    before = None
    for row in evaluation.table.to_dict("records"):
        name = "" if row["metric"] == before else str(row["metric"])
        before = row["metric"]
        table.add_row(name, escape(str(row["method"])), _number(row["value"]), _interval(row["low"], row["high"]))
    console.print(table)
    for finding in evaluation.findings:
        console.print(escape(finding), highlight=False)
    for name, reason in evaluation.skipped.items():
        console.print(f"[dim]not tested: {escape(name)}: {escape(reason)}[/dim]", highlight=False)


def print_files(console: Console, folder: OutputFolder) -> None:
    """Where the results are, the report last."""
    for path, meaning in (
        (folder.scores, "all scores, for rf.Scores.load"),
        (folder.top, "the most helpful and harmful train rows"),
        (folder.certificate, "what is known of the error of the scores"),
        (folder.leverage, "all leverage scores, for rf.LeverageScores.load"),
        (folder.summary, "every number under a flat key"),
        (folder.results, "the same as a tidy table"),
        (folder.figures, "the pictures"),
        (folder.ground_truth, "what retrained models measured; kept for the next run"),
        (folder.manifest, "all that determined them"),
        (folder.report, "open this in a browser"),
    ):
        if path.exists():
            console.print(f"  {escape(str(path))}  [dim]{meaning}[/dim]", soft_wrap=True, highlight=False)


def _facts(explanation: Explanation) -> Table:
    influence, problem = explanation.influence, explanation.problem
    n_test, n_train = explanation.scores.values.shape
    table = Table(title=escape(problem.title), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    lines: dict[str, str] = {"explained": f"{n_test:,} test rows by {n_train:,} train rows"}
    if problem.benchmark is not None:
        lines["test accuracy"] = f"{problem.benchmark.accuracy:.1%}"
    if influence.skipped:
        lines["left out"] = sentence(influence.skipped, influence.n_train)
    lines |= {
        "attributed": influence.coverage.summary,
        "curvature": influence.curvature,
        "solver": _solver(influence),
        **{found.name.lower(): found.sentence for found in findings(influence.diagnostics)},
        "damping λ": _damping(influence.damping),
        "effective dimension": _number(influence.effective_dimension),
        "gradient norm": _number(influence.gradient_norm),
        "against reality": NOT_VERIFIED
        if explanation.verification is None
        else f"{explanation.verification.verdict}: {explanation.verification.sentence}",
        "time": ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in explanation.seconds.items()),
    }
    if explanation.certificate is not None:
        lines["certificate"] = explanation.certificate.summary()
    for name, value in lines.items():
        table.add_row(name, escape(value))
    return table


def _solver(influence: Influence) -> str:
    """The solver and, where an accuracy chose it, why."""
    plan = influence.plan
    return plan.solver if influence.settings.accuracy is None else f"{plan.solver}: {plan.reason}"


def _strongest(top: pd.DataFrame) -> Table:
    table = Table(title="strongest train rows (score)", title_justify="left", title_style="italic")
    for column in ("test row", "most helpful", "most harmful"):
        table.add_column(column, justify="right")
    first = top[top["rank"] == top["rank"].min()]
    tests = list(dict.fromkeys(first["test"]))
    for test in tests[:MAX_ROWS]:
        of_test = first[first["test"] == test].set_index("direction")
        table.add_row(str(test), *(_entry(of_test, side) for side in ("helpful", "harmful")))
    if len(tests) > MAX_ROWS:
        table.caption = f"and {len(tests) - MAX_ROWS:,} more test rows"
    return table


def _entry(of_test: pd.DataFrame, direction: str) -> str:
    if direction not in of_test.index:
        return "—"
    return f"{of_test['train'][direction]}  ({of_test['score'][direction]:+.4g})"


def _damping(damping: float | Mapping[str, float]) -> str:
    if isinstance(damping, Mapping):
        return f"{min(damping.values()):.4g} to {max(damping.values()):.4g} over {len(damping)} blocks"
    return _number(damping)


def _interval(low: float, high: float) -> str:
    return f"{low:.4g} to {high:.4g}" if math.isfinite(low) and math.isfinite(high) else "—"


def _number(value: Any) -> str:
    return "—" if value is None else f"{float(value):.4g}"
