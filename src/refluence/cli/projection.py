"""`refluence study spectrum-bounds` and its sisters: the published options, with the published defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from importlib import import_module
from inspect import Signature
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from refluence.cli.projection_options import DAMPINGS, FACTORS, GRID, OPTIONS, RUN, SKETCHES, TRAINED, UTILITY
from refluence.cli.root import examples
from refluence.cli.study import StudyCommand, app

Summary = Mapping[str, Any]


def add_study(
    name: str,
    settings: str,
    text: str,
    options: Sequence[str],
    columns: Mapping[str, str],
    note: Callable[[Summary], str],
    *lines: tuple[str, str],
    **defaults: Any,
) -> None:
    """Add a study to the commands.

    Args:
        name: of the command; with underscores, of its module.
        settings: the class of its settings there.
        text: its help.
        options: names in `OPTIONS`, in the order of the help.
        columns: the lists of the summary that are printed side by side, key → title; {measure} in a key is the
            summary's, and a list that it has not is left out.
        note: the sentence below, from the summary.
        lines: examples, (command, what it does).
        defaults: where they differ from those in `OPTIONS`.
    """

    def command(**given: Any) -> None:
        summary, folder = repeat(name.replace("-", "_"), settings, given)
        if not given["quiet"]:
            keys = {key.format_map(summary): title for key, title in columns.items()}
            print_columns(Console(), summary, {key: keys[key] for key in keys if summary.get(key) is not None})
            last = f"{note(summary)}{summary['cpu_seconds']:.0f} s of CPU. Open {folder / 'report.html'}"
            Console().print(last, highlight=False, soft_wrap=True)

    parameters = {option: OPTIONS[option] for option in options}
    parameters |= {option: parameters[option].replace(default=value) for option, value in defaults.items()}
    command.__signature__ = Signature(list(parameters.values()))  # type: ignore[attr-defined]
    app.command(name, cls=StudyCommand, help=text, epilog=examples(*lines))(command)


def repeat(study: str, settings: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """Run a study with the options of its command: its summary, and the folder of its results."""
    module = import_module(f"refluence.studies.projection.{study}")
    names = (given[name] for name in ("dataset", "model", "proj_type", "test_mode") if name in given)
    folder = given["out"] or Path("results") / study / "_".join(names)
    shared = {name: given[name] for name in ("cache_dir", "ground_truth") if name in given}
    plain = {name: value.value if isinstance(value, StrEnum) else value for name, value in given.items()}
    chosen = getattr(module, settings)().with_values(plain)
    return module.run(chosen, folder, **shared, progress=not given["quiet"]), folder


def print_columns(console: Console, summary: Summary, columns: Mapping[str, str]) -> None:
    """Lists of a summary side by side."""
    from refluence.studies.projection.output import short

    table = Table(*columns.values(), box=None, pad_edge=False)
    for values in zip(*(summary[key] for key in columns), strict=True):
        table.add_row(*map(short, values))
    console.print(table)


add_study(
    "spectrum-bounds",
    "SpectrumBounds",
    "Error of sketched scores against m/d_λ (Figures 1 and 2 of arXiv 2602.10449).",
    (
        *("dataset", "model", "test_mode", "num_test_grads", "min_d_lambda", "rank_cut", "corrected"),
        *(*SKETCHES, *GRID, "offload", *RUN),
    ),
    {
        "damping": "λ",
        "effective_dimension": "d_λ",
        "{measure}_plateau": "plateau",
        "{measure}_over_plateau_at_10": "@10",
        "{measure}_over_plateau_at_100": "@100",
        "{measure}_bump": "bump",
        "{measure}_slope": "slope",
        "{measure}_corrected_over_plateau_at_10": "corr. @10",
        "{measure}_corrected_slope": "slope",
    },
    lambda _: "@10, @100 and the bump: 95 % error at that m/d_λ, in plateaus (the error without any sketch). ",
    ("refluence study spectrum-bounds --dataset digits --out sb", "a quick one, without a download"),
    ("refluence study spectrum-bounds --model lr --test_mode test", "the paper's Figure 2, softmax regression"),
    ("refluence study spectrum-bounds --proj_type sjlt --m_exp_max 12", "sparse sketches of the gradients"),
)

add_study(
    "barrier",
    "Barrier",
    "Error of undamped scores against m over the rank (Theorem 1 of arXiv 2602.10449).",
    ("dataset", "model", "num_test_grads", "ratio_max", "ratio_steps", "rank_cut", *SKETCHES, "offload", *RUN),
    {
        "m": "m",
        "lost": "directions lost",
        "self_mean": "self-influence lost",
        "self_max": "largest",
        "eps_95": "95 % error",
        "eps_max": "largest error",
    },
    lambda summary: f"Rank {summary['rank']}. ",
    ("refluence study barrier --dataset digits --out barrier", "a quick one, without a download"),
)


def _of_factors(summary: Summary) -> str:
    if "factorised_ratio_smallest" not in summary:
        return ""
    low, high = summary["factorised_ratio_smallest"], summary["factorised_ratio_largest"]
    return f"Factorised: measured ÷ predicted {low:.3f} to {high:.3f}. "


add_study(
    "leakage",
    "Leakage",
    "Leakage of test gradients out of range, measured against predicted (Theorems 8 and 9 of arXiv 2602.10449).",
    ("dataset", "model", "num_test_grads", "min_d_lambda", *FACTORS, *SKETCHES, *GRID, "offload", *RUN),
    {
        "damping": "λ",
        "effective_dimension": "d_λ",
        "ratio": "measured ÷ predicted",
        "covered": "within 1.96",
        "over_scores": "leakage ÷ scores",
        "slope": "slope in m",
    },
    _of_factors,
    ("refluence study leakage --dataset digits --out leakage", "a quick one, without a download"),
    m_exp_min=5,
    m_exp_max=12,
    lambda_exp_min=-4,
    lambda_exp_max=0,
)

add_study(
    "certificate",
    "CertificateStudy",
    "Coverage of standard errors, certain bounds and order statistics over many sketches.",
    ("dataset", "model", "num_test_grads", "dimension", "ratios", *SKETCHES, "offload", *RUN),
    {
        "m": "m",
        "m_over_d": "m/d_κ",
        "covered": "95 % intervals hold",
        "spread": "error ÷ its error",
        "error": "error ÷ scores",
        "factor": "factor",
        "bound": "certain ÷ scores",
        "held": "order statistic holds",
    },
    lambda summary: f"{summary['violations']} of {summary['pairs']:,} pairs outside a certain bound. ",
    ("refluence study certificate --dataset digits --num_trials 50 --out certificate", "a quick one"),
    ("refluence study certificate --model lr --proj_type sjlt", "sparse sketches, softmax regression on MNIST"),
    num_test_grads=200,
    n_train=600,
    num_trials=200,
)

add_study(
    "factorized-edim",
    "FactorizedEdim",
    "Effective dimension of factorised and unstructured sketches by layer (Remark 7 of arXiv 2602.10449).",
    ("dataset", "model", "compute_full_fisher", *TRAINED, *DAMPINGS, *RUN),
    {
        "damping": "λ",
        "unstructured": "Σ d_λ(A⊗E)",
        "factorised": "Σ of products",
        "ratio": "ratio",
        "full_fisher": "d_λ(F)",
    },
    lambda _: "",
    ("refluence study factorized-edim --model mlp --compute_full_fisher", "with the whole Fisher too"),
    model="lr",
)

add_study(
    "hyperparam-selection",
    "HyperparamSelection",
    "λ by validation at a large m, then the smallest m that keeps the utility (Figure 4 of arXiv 2602.10449).",
    ("dataset", "model", "num_test_grads", *UTILITY, "offload", *RUN),
    {"m": "m", "validation_lds_by_m": "validation LDS", "test_lds_by_m": "test LDS"},
    lambda summary: (
        f"λ* = {summary['best_damping']:.3g} with d_λ* = {summary['effective_dimension']:.4g}; validation "
        f"LDS {summary['validation_lds']:.4f}, test LDS {summary['test_lds']:.4f} at m = {summary['largest_size']}; "
        f"m₉₅ = {summary['m_95']} = {summary['m_95_over_d']:.3g} d_λ*. "
    ),
    ("refluence study hyperparam-selection --dataset digits --out hs", "a quick one, without a download"),
    ("refluence study hyperparam-selection --model lr --lambda_steps 50", "the paper's Figure 4"),
    m_exp_min=5,
)

add_study(
    "faithfulness-utility",
    "FaithfulnessUtility",
    "Error and LDS of every size and damping (Figure 3 of arXiv 2602.10449).",
    (
        *("dataset", "model", "faithfulness_threshold", "num_test_samples", "num_test_grads", "rank_cut"),
        *(*UTILITY, "offload", *RUN),
    ),
    {
        "m": "m",
        "best_damping": "λ*",
        "effective_dimension": "d_λ*",
        "validation_lds": "validation LDS",
        "test_lds": "test LDS",
        "test_lds_at_own_damping": "at own λ",
        "eps_95": "95 % error",
        "gap_95": "by the gap",
    },
    lambda summary: (
        f"The LDS falls {summary['lds_falls']} times from one size to the next, λ* rises "
        f"{summary['damping_rises']} times. "
    ),
    ("refluence study faithfulness-utility --dataset digits --out fu", "a quick one, without a download"),
    ("refluence study faithfulness-utility --model lr --lambda_steps 50", "the paper's Figure 3"),
    m_exp_min=5,
)
