"""`refluence evaluate`: methods of attribution and baselines, tested against what really happens."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import typer
from torch import nn

import refluence as rf
from refluence.cli.explanation import describe, timed, versions
from refluence.cli.findings import findings
from refluence.cli.method import Method
from refluence.cli.metrics import METRICS, RANDOM, Metric, applicable
from refluence.cli.output_folder import OutputFolder
from refluence.cli.problem import Problem
from refluence.cli.rows import select_rows
from refluence.cli.trial import Effort, Trial
from refluence.errors import DataError
from refluence.evaluation import baselines as base
from refluence.evaluation.tuning import tune_damping
from refluence.report.evaluation import Evaluated, Figure, Part, write_evaluation
from refluence.report.facts import Fact
from refluence.report.formatting import number

GRID = tuple(10.0**power for power in np.arange(-5, 1.5, 0.5).tolist())
"""Dampings that --tune-damping tries."""
HELD_OUT = 0.1
BASELINES = ("random", "loss", "dot", "cosine", "neighbours")
MIN_SUBSETS = 3


@dataclass(frozen=True)
class Asked:
    """What is evaluated, as given on the command line."""

    methods: Mapping[str, Method]
    metrics: str | None = None
    baselines: str | None = None
    tune_damping: bool = False
    effort: Effort = field(default_factory=Effort)

    def check(self) -> None:
        """Raise typer.BadParameter for names that are not known or numbers that do not go together."""
        _names(self.metrics, tuple(METRICS), "--metrics")
        if self.baselines != "none":
            _names(self.baselines, BASELINES, "--baselines")
        if self.effort.subsets < MIN_SUBSETS:
            raise typer.BadParameter(
                f"a rank correlation over {self.effort.subsets} subsets needs {MIN_SUBSETS} at the least",
                param_hint="--subsets",
            )


@dataclass(frozen=True)
class Evaluation:
    """What was found: the tidy table (method, kind, metric, value, low, high, confidence), and in words."""

    problem: Problem
    table: pd.DataFrame
    findings: list[str]
    skipped: dict[str, str]
    summary: dict[str, Any]


def run(problem: Problem, rows: list[int], asked: Asked, folder: OutputFolder, options: dict[str, Any]) -> Evaluation:
    """Fit and score every method, retrain what the metrics need, and write table, pictures, page and manifest.

    Raises:
        DataError: a metric or baseline asked for by name that does not apply; a tuned damping without a recipe.
    """
    metrics, skipped = applicable(problem, _names(asked.metrics, tuple(METRICS), "--metrics"))
    if asked.tune_damping and problem.recipe is None:
        raise DataError(f"--tune-damping chooses by held-out LDS: {METRICS['lds'].missing(problem)}")
    seconds: dict[str, float] = {}
    trial = Trial(
        problem,
        select_rows(problem.test, rows),
        rows,
        list(range(len(rows))),
        {},
        {},
        {},
        folder.ground_truth,
        asked.effort,
    )
    notes: list[str] = []
    tuned: dict[str, Any] = {}
    with timed(seconds, "attribution"):
        trial = _scored(trial, asked, notes, tuned)
    trial = dataclasses.replace(trial, baselines=_baselines(trial, asked, notes))
    tables = {}
    for metric in metrics:
        with timed(seconds, metric.name), warnings.catch_warnings(record=True) as caught:
            tables[metric.name] = metric.measure(trial)
        notes += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    if not tables:
        raise DataError(f"nothing is left to test: {'; '.join(f'{name}: {why}' for name, why in skipped.items())}")
    table = pd.concat(tables.values(), ignore_index=True)
    table = table.sort_values("metric", key=lambda names: names.map(_order(names)), kind="stable", ignore_index=True)
    found = findings(trial, tables)
    figures = _draw(trial, tables, folder)
    summary = _summary(trial, table, skipped, tuned)
    manifest = {
        "command": "evaluate",
        "options": options,
        "versions": versions(),
        "problem": describe(problem),
        "test_rows": rows,
        "reported_rows": [rows[i] for i in trial.reported],
        "methods": {name: influence.manifest() for name, influence in trial.influences.items()},
        "tuned_damping": tuned,
        "findings": found,
        "notes": notes,
        "skipped": skipped,
        "timings_seconds": seconds,
    }
    table.to_parquet(folder.results, index=False)
    folder.summary.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    parts = [Part(m.name, m.title, m.meaning, tables[m.name], figures.get(m.name)) for m in metrics]
    write_evaluation(
        folder.report,
        Evaluated(
            title=f"Evaluation: {problem.title}",
            description=problem.benchmark.description if problem.benchmark else "",
            findings=found,
            facts=_facts(trial, metrics),
            parts=parts,
            skipped=skipped,
            notes=notes,
            manifest={key: value for key, value in manifest.items() if key not in ("test_rows", "reported_rows")},
        ),
    )
    folder.finish(manifest)
    return Evaluation(problem, table, found, skipped, summary)


def _names(text: str | None, known: Sequence[str], hint: str) -> list[str] | None:
    """The names in a list separated by commas; None where none was given, all of them for "all"."""
    if text is None:
        return None
    if text.strip() == "all":
        return list(known)
    names = [name.strip().replace("_", "-") for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not known: use all, or some of {', '.join(known)}", param_hint=hint)
    if not names:
        raise typer.BadParameter(f"{text!r} names nothing: use all, or some of {', '.join(known)}", param_hint=hint)
    return names


def _scored(trial: Trial, asked: Asked, notes: list[str], tuned: dict[str, Any]) -> Trial:
    """The trial with every method fitted and scored; with tuned dampings on the other nine tenths of the rows."""
    influences: dict[str, rf.Influence] = {}
    scores: dict[str, rf.Scores] = {}
    reported = trial.reported
    for name, method in asked.methods.items():
        influence = method.fit(trial.problem)
        if asked.tune_damping:
            found = tune_damping(
                influence,
                trial.test,
                trial.half_subsets(),
                GRID,
                share=HELD_OUT,
                measurement=trial.measurement,
                seed=asked.effort.seed,
                progress=asked.effort.progress,
            )
            influence, reported, own = found.influence, found.reported_rows, found.scores
            tuned[name] = {"damping": found.damping, "at_edge": found.at_edge, "table": found.table.to_dict("records")}
            if found.at_edge:
                notes.append(f"{name}: the damping chosen, {found.damping:g}, is the end of the grid that was tried.")
        else:
            own = influence.score(trial.test)
        influences[name] = influence
        rows = np.asarray([trial.rows[i] for i in reported])
        scores[name] = dataclasses.replace(own, test_ids=rows)
    return dataclasses.replace(trial, influences=influences, scores=scores, reported=list(reported))


def _baselines(trial: Trial, asked: Asked, notes: list[str]) -> dict[str, rf.Scores]:
    """The baselines' scores of the reported rows."""
    if asked.baselines == "none":
        return {}
    task, train, test = trial.problem.task, trial.problem.train, trial.reported_test
    progress = asked.effort.progress
    names = _names(asked.baselines, BASELINES, "--baselines")
    makers: dict[str, tuple[str, Callable[[], rf.Scores]]] = {
        "random": (RANDOM, lambda: base.random_scores(*_shape(trial), seed=asked.effort.seed)),
        "loss": ("loss", lambda: base.loss_scores(task, train, test)),
        "dot": ("gradient dot", lambda: base.gradient_dot(task, train, test, progress=progress)),
        "cosine": ("gradient cosine", lambda: base.gradient_cosine(task, train, test, progress=progress)),
        "neighbours": ("embedding cosine", lambda: base.embedding_neighbours(task, train, test)),
    }
    if names is None and not any(isinstance(module, nn.Linear) for module in task.model.modules()):
        names = [name for name in BASELINES if name != "neighbours"]
        notes.append("No embedding neighbours: the model has no nn.Linear whose input could be compared.")
    ids = np.asarray([trial.rows[i] for i in trial.reported])
    return {
        title: dataclasses.replace(make(), test_ids=ids)
        for name, (title, make) in makers.items()
        if names is None or name in names
    }


def _shape(trial: Trial) -> tuple[int, int]:
    k, n = next(iter(trial.scores.values())).values.shape
    return k, n


def _draw(trial: Trial, tables: Mapping[str, pd.DataFrame], folder: OutputFolder) -> dict[str, Figure]:
    """Every picture as a file, and for the page; LDS has the bars of its table there and needs no other."""
    import matplotlib

    from refluence.evaluation import plots

    pictures = dict(trial.pictures)
    if "lds" in tables:
        pictures["lds"] = lambda: plots.plot_comparison(tables["lds"], "lds")
    descriptions = {
        "loo": "Predicted against measured change without single train rows, for "
        f"{next(iter(trial.scores))}; the dashed line is y = x.",
        "mislabel": "Share of the wrong labels found against share of the train rows inspected.",
        "removal": "Change of the measurement after retraining, against train rows removed.",
        "brittleness": "Share of predictions flipped, against helpful train rows removed.",
        "lds": "LDS of every method and baseline with intervals.",
    }
    folder.figures.mkdir(exist_ok=True)
    made = {}
    with matplotlib.rc_context({"backend": "agg"}):
        import matplotlib.pyplot as plt

        for name, draw in pictures.items():
            figure = draw().figure
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=144)
            plt.close(figure)
            (folder.figures / f"{name}.png").write_bytes(buffer.getvalue())
            if name != "lds":
                made[name] = Figure(buffer.getvalue(), descriptions[name])
    return made


def _summary(trial: Trial, table: pd.DataFrame, skipped: Mapping[str, str], tuned: Mapping[str, Any]) -> dict[str, Any]:
    """Flat keys: METHOD/METRIC with /low and /high, the dampings, and how much was done."""
    summary: dict[str, Any] = {
        "problem": trial.problem.title,
        "methods": list(trial.scores),
        "baselines": list(trial.baselines),
        "train_rows": _shape(trial)[1],
        "test_rows": len(trial.rows),
        "reported_test_rows": len(trial.reported),
        "subsets": trial.effort.subsets,
        "seeds": trial.effort.seeds,
        "seed": trial.effort.seed,
        "skipped": sorted(skipped),
    }
    for name, influence in trial.influences.items():
        summary[f"{name}/damping"] = influence.damping
        summary[f"{name}/damping_tuned"] = name in tuned
        summary[f"{name}/effective_dimension"] = _finite(influence.effective_dimension)
    for row in table.to_dict("records"):
        key = f"{row['method']}/{row['metric']}"
        summary |= {key: _finite(row["value"])} | {f"{key}/{end}": _finite(row[end]) for end in ("low", "high")}
    return summary


def _order(names: pd.Series) -> dict[str, int]:
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _facts(trial: Trial, metrics: Sequence[Metric]) -> list[Fact]:
    k, n = _shape(trial)
    tested = any(metric.name == "lds" for metric in metrics)
    facts = [
        Fact("Methods", str(len(trial.scores)), ", ".join(trial.scores)),
        Fact("Test rows reported", f"{k:,}", f"of {len(trial.rows):,}; dampings were chosen on the others")
        if k < len(trial.rows)
        else Fact("Test rows", f"{k:,}", "all of them are reported"),
        Fact("Train rows", f"{n:,}", "each has a score for every test row"),
    ]
    if tested:
        models = trial.effort.subsets * trial.effort.seeds
        recipe = trial.recipe.describe()
        facts.insert(0, Fact("Models retrained", f"{models:,}", f"on random halves: {recipe}"))
    for name, influence in trial.influences.items():
        damping = influence.damping
        value = number(damping) if isinstance(damping, float) else f"{len(damping)} blocks"
        facts.append(Fact(f"λ of {name}", value, f"effective dimension {number(influence.effective_dimension)}"))
    return facts
