"""The options of the commands of `refluence.cli.projection`, each once: by name, in groups, with published defaults."""

from __future__ import annotations

from enum import StrEnum
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from refluence.cli import options as o

_WHAT, _SKETCH, _GRID, _RUN = "What to study", "Sketches", "The grid", "How it runs"
_FACTORS, _TRUTH = "Factorised sketches", "The ground truth"


class ProjectionName(StrEnum):
    """The random projections of the published scripts."""

    NORMAL = "normal"
    RADEMACHER = "rademacher"
    SJLT = "sjlt"


class OffloadName(StrEnum):
    """Where projected rows are kept."""

    NONE = "none"
    CPU = "cpu"
    DISK = "disk"


class TestModeName(StrEnum):
    """Which scores are compared."""

    SELF = "self"
    TEST = "test"


def _option(name: str, kind: Any, default: Any, panel: str, text: str, *spellings: str, **more: Any) -> Parameter:
    """An option, named --name where no spellings are given."""
    option = typer.Option(*spellings, help=text, rich_help_panel=panel, **more)
    return _parameter(name, Annotated[kind, option], default)


def _parameter(name: str, annotation: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers between commas.

    Raises:
        typer.BadParameter: something else.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no list such as 1.5,2,4,8", param_hint="--ratios") from error


_ALL = (
    _option("dataset", str, "mnist", _WHAT, "mnist, cifar2, maestro, digits, or another built-in set."),
    _option("model", str, "mlp", _WHAT, "lr, mlp, resnet9, musictransformer, …"),
    _option("num_test_grads", int, 500, _WHAT, "Test gradients.", min=1),
    _option("n_train", int | None, None, _WHAT, "Train rows; default the published number.", min=2),
    _option("n_test", int | None, None, _WHAT, "Test rows; default the published number.", min=1),
    _option("epochs", int | None, None, _WHAT, "Of training; default the recipe's.", min=1),
    _option("model_seed", int, 0, _WHAT, "Of training.", min=0),
    _option(
        "dtype", o.DtypeName, o.DtypeName.FLOAT64, _WHAT, "Of the gradients; inner products are float64 always."
    ),
    _option(
        "rank_cut", float, 1e-10, _WHAT, "Eigenvalues above this share of the largest count for τ_0.", min=0.0, max=0.99
    ),
    _option("min_d_lambda", float, 1.0, _WHAT, "Leave out dampings of a smaller effective dimension.", min=0.0),
    _option(
        "test_mode", TestModeName, TestModeName.SELF, _WHAT,
        "self: self-influence; test: every pair of a train and a test row.",
    ),
    _option("corrected", bool, True, _WHAT, "Also the scores corrected for the damping that a sketch adds."),
    _option(
        "compute_full_fisher", bool, False, _WHAT, "Also d_λ of the whole Fisher.", "--compute-full-fisher"
    ),
    _option(
        "faithfulness_threshold", float, 0.01, _WHAT, "95 % error up to which scores count as faithful."
    ),
    _option("num_test_samples", int, 500, _WHAT, "Reported tests on which errors are measured.", min=1),
    _option("proj_type", ProjectionName, ProjectionName.NORMAL, _SKETCH, "The random projection."),
    _option(
        "gram_space", bool, True, _SKETCH,
        "Draw normal sketches of the Gram matrix (the same law), or of the gradients.",
    ),
    _option("num_trials", int, 5, _SKETCH, "Independent sketches of each size.", min=1),
    _option("seed", int, 42, _SKETCH, "Of the first trial's sketch and of splits.", min=0),
    _option("m_exp_min", int, 2, _GRID, "Smallest size, 2 to this power.", min=0),
    _option("m_exp_max", int, 20, _GRID, "Largest size, 2 to this power; d and more are left out.", min=0),
    _option("m_steps", int, 0, _GRID, "Sizes, equally spaced in log m; 0: every power of two.", min=0),
    _option("lambda_exp_min", int, -8, _GRID, "Smallest λ, 10 to this power."),
    _option("lambda_exp_max", int, 2, _GRID, "Largest λ, 10 to this power."),
    _option("lambda_steps", int, 0, _GRID, "Dampings, equally spaced in log λ; 0: every power of ten.", min=0),
    _option("ratio_max", float, 1.2, _GRID, "Largest size, in ranks.", min=0.01),
    _option("ratio_steps", int, 12, _GRID, "Sizes up to it; the rank and its neighbours are added.", min=1),
    _option("dimension", float, 60.0, _GRID, "d_κ of the damping.", min=1.0),
    _option("ratios", str, "1.5,2,4,8", _GRID, "Sketch sizes over d_κ, by commas.", callback=_numbers),
    _option("factor_rows", int, 32, _FACTORS, "Train rows of the factors A and E.", min=1),
    _option("factor_tests", int, 50, _FACTORS, "Tests.", min=1),
    _option("factor_exp_min", int, 3, _FACTORS, "Smallest m_A and m_E, 2 to this.", min=0),
    _option("factor_exp_max", int, 7, _FACTORS, "Largest m_A and m_E, 2 to this.", min=0),
    _option("factor_draws", int, 100, _FACTORS, "Sketches of each pair of sizes; 0: leave this part out.", min=0),
    _option("factor_damping", float, 1e-2, _FACTORS, "λ as a share of ‖A‖‖E‖."),
    _option(
        "val_ratio", float, 0.1, _TRUTH, "Share of the tests on which λ is chosen, and only there.", min=0.0, max=1.0
    ),
    _option("num_subsets", int, 100, _TRUTH, "Random halves to retrain on.", min=3),
    _option("models_per_subset", int, 1, _TRUTH, "Models of each half, averaged.", min=1),
    _option(
        "ground_truth", Path | None, None, _TRUTH,
        "Folder of retrained models that studies share; default in the results.", file_okay=False,
    ),
    _option(
        "offload", OffloadName, OffloadName.CPU, _RUN,
        "Where the rows that a projection of the gradients gives are kept between sizes.",
    ),
    _option(
        "cache_dir", Path | None, None, _RUN, "Folder for spectra that studies share, and for --offload disk.",
        file_okay=False,
    ),
    _option("batch_size", int, 256, _RUN, "Rows a forward pass; changes no number.", min=1),
    _option("device", str | None, None, _RUN, "cpu, cuda, cuda:1; default cpu."),
    _option(
        "out", Path | None, None, _RUN, "Folder for the results; default results/STUDY/DATASET_MODEL_….",
        "--out", "--output-dir", file_okay=False,
    ),
    _parameter("quiet", o.Quiet, False),
    _parameter("debug", o.Debug, False),
)  # fmt: skip

OPTIONS = {option.name: option for option in _ALL}
"""Each option by its name."""

TRAINED = ("n_train", "n_test", "epochs", "model_seed", "dtype")
SKETCHES = (*TRAINED, "proj_type", "gram_space", "num_trials", "seed")
DAMPINGS = ("lambda_exp_min", "lambda_exp_max", "lambda_steps")
GRID = ("m_exp_min", "m_exp_max", "m_steps", *DAMPINGS)
FACTORS = ("factor_rows", "factor_tests", "factor_exp_min", "factor_exp_max", "factor_draws", "factor_damping")
UTILITY = (*SKETCHES, *GRID, "val_ratio", "num_subsets", "models_per_subset", "ground_truth")
RUN = ("cache_dir", "batch_size", "device", "out", "quiet", "debug")
