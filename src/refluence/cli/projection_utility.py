"""`refluence study hyperparam-selection` and `faithfulness-utility`: studies against retrained models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from refluence.cli import options as o
from refluence.cli import projection as p
from refluence.cli.root import examples
from refluence.cli.study import StudyCommand, app

_TRUTH = "The ground truth"

ValRatio = Annotated[
    float,
    typer.Option(
        "--val-ratio", help="Share of the tests on which λ is chosen, and only there.", min=0.0, max=1.0,
        rich_help_panel=_TRUTH,
    ),
]  # fmt: skip
NumSubsets = Annotated[
    int, typer.Option("--num-subsets", help="Random halves to retrain on.", min=3, rich_help_panel=_TRUTH)
]
ModelsPerSubset = Annotated[
    int,
    typer.Option("--models-per-subset", help="Models of each half, averaged.", min=1, rich_help_panel=_TRUTH),
]
GroundTruth = Annotated[
    Path | None,
    typer.Option(
        "--ground-truth",
        help="Folder of retrained models that studies share; default in the results.",
        file_okay=False,
        rich_help_panel=_TRUTH,
    ),
]


def _common(given: dict[str, Any]) -> dict[str, Any]:
    """What both studies are told, from the options of a command."""
    from refluence.studies.projection.utility import Retraining

    names = (
        "dataset", "model", "n_train", "n_test", "num_test_grads", "epochs", "model_seed", "dtype", "device",
        "batch_size", "rank_cut",
    )  # fmt: skip
    sizes, dampings = p.grid_options(
        (given["m_exp_min"], given["m_exp_max"], given["m_steps"]),
        (given["lambda_exp_min"], given["lambda_exp_max"], given["lambda_steps"]),
    )
    return {
        "problem": p.problem_options(**{name: given[name] for name in names}),
        "sketching": p.sketching_options(
            given["proj_type"], given["num_trials"], given["seed"], given["gram_space"], given["offload"]
        ),
        "sizes": sizes,
        "dampings": dampings,
        "retraining": Retraining(given["num_subsets"], given["models_per_subset"], given["val_ratio"]),
    }


@app.command(
    "hyperparam-selection",
    cls=StudyCommand,
    epilog=examples(
        ("refluence study hyperparam-selection --dataset digits --out hs", "a quick one, without a download"),
        ("refluence study hyperparam-selection --model lr --lambda_steps 50", "the paper's Figure 4"),
    ),
)
def hyperparam_selection(
    dataset: p.Dataset = "mnist",
    model: p.Model = "mlp",
    num_test_grads: p.NumTestGrads = 500,
    n_train: p.NTrain = None,
    n_test: p.NTest = None,
    epochs: p.Epochs = None,
    model_seed: p.ModelSeed = 0,
    dtype: p.Dtype = o.DtypeName.FLOAT64,
    rank_cut: p.RankCut = 1e-10,
    proj_type: p.ProjType = p.ProjectionName.NORMAL,
    gram_space: p.GramSpace = True,
    num_trials: p.NumTrials = 5,
    seed: p.Seed = 42,
    m_exp_min: p.MinExp = 5,
    m_exp_max: p.MaxExp = 20,
    m_steps: p.MSteps = 0,
    lambda_exp_min: p.LambdaMin = -8,
    lambda_exp_max: p.LambdaMax = 2,
    lambda_steps: p.LambdaSteps = 0,
    val_ratio: ValRatio = 0.1,
    num_subsets: NumSubsets = 100,
    models_per_subset: ModelsPerSubset = 1,
    ground_truth: GroundTruth = None,
    offload: p.Offload = p.OffloadName.CPU,
    cache_dir: p.CacheDir = None,
    batch_size: p.BatchSize = 256,
    device: p.Device = None,
    out: p.Out = None,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """λ by validation at a large m, then the smallest m that keeps the utility (Figure 4 of arXiv 2602.10449)."""
    from refluence.studies.projection.hyperparam_selection import HyperparamSelection, run

    options = HyperparamSelection(**_common(locals()))
    folder = p.place(out, "hyperparam_selection", dataset, model, proj_type.value)
    summary = run(options, folder, cache_dir=cache_dir, ground_truth=ground_truth, progress=not quiet)
    if quiet:
        return
    console = Console()
    p.print_columns(console, summary, {"m": "m", "validation_lds_by_m": "validation LDS", "test_lds_by_m": "test LDS"})
    console.print(
        f"λ* = {summary['best_damping']:.3g} with d_λ* = {summary['effective_dimension']:.4g}; validation LDS "
        f"{summary['validation_lds']:.4f}, test LDS {summary['test_lds']:.4f} at m = {summary['largest_size']}; "
        f"m₉₅ = {summary['m_95']} = {summary['m_95_over_d']:.3g} d_λ*. {summary['cpu_seconds']:.0f} s of CPU. "
        f"Open {folder / 'report.html'}",
        highlight=False,
        soft_wrap=True,
    )


@app.command(
    "faithfulness-utility",
    cls=StudyCommand,
    epilog=examples(
        ("refluence study faithfulness-utility --dataset digits --out fu", "a quick one, without a download"),
        ("refluence study faithfulness-utility --model lr --lambda_steps 50", "the paper's Figure 3"),
    ),
)
def faithfulness_utility(
    dataset: p.Dataset = "mnist",
    model: p.Model = "mlp",
    faithfulness_threshold: Annotated[
        float, p.option("faithfulness-threshold", "95 % error up to which scores count as faithful.", "What to study")
    ] = 0.01,
    num_test_samples: Annotated[
        int, p.option("num-test-samples", "Reported tests on which errors are measured.", "What to study", min=1)
    ] = 500,
    num_test_grads: p.NumTestGrads = 500,
    n_train: p.NTrain = None,
    n_test: p.NTest = None,
    epochs: p.Epochs = None,
    model_seed: p.ModelSeed = 0,
    dtype: p.Dtype = o.DtypeName.FLOAT64,
    rank_cut: p.RankCut = 1e-10,
    proj_type: p.ProjType = p.ProjectionName.NORMAL,
    gram_space: p.GramSpace = True,
    num_trials: p.NumTrials = 5,
    seed: p.Seed = 42,
    m_exp_min: p.MinExp = 5,
    m_exp_max: p.MaxExp = 20,
    m_steps: p.MSteps = 0,
    lambda_exp_min: p.LambdaMin = -8,
    lambda_exp_max: p.LambdaMax = 2,
    lambda_steps: p.LambdaSteps = 0,
    val_ratio: ValRatio = 0.1,
    num_subsets: NumSubsets = 100,
    models_per_subset: ModelsPerSubset = 1,
    ground_truth: GroundTruth = None,
    offload: p.Offload = p.OffloadName.CPU,
    cache_dir: p.CacheDir = None,
    batch_size: p.BatchSize = 256,
    device: p.Device = None,
    out: p.Out = None,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Error and LDS of every size and damping (Figure 3 of arXiv 2602.10449)."""
    from refluence.studies.projection.faithfulness_utility import FaithfulnessUtility, run

    options = FaithfulnessUtility(
        **_common(locals()), faithfulness_threshold=faithfulness_threshold, num_test_samples=num_test_samples
    )
    folder = p.place(out, "faithfulness_utility", dataset, model, proj_type.value)
    summary = run(options, folder, cache_dir=cache_dir, ground_truth=ground_truth, progress=not quiet)
    if quiet:
        return
    console = Console()
    columns = {
        "m": "m", "best_damping": "λ*", "effective_dimension": "d_λ*", "validation_lds": "validation LDS",
        "test_lds": "test LDS", "test_lds_at_own_damping": "at own λ", "eps_95": "95 % error", "gap_95": "by the gap",
    }  # fmt: skip
    p.print_columns(console, summary, columns)
    console.print(
        f"The LDS falls {summary['lds_falls']} times from one size to the next, λ* rises {summary['damping_rises']} "
        f"times. {summary['cpu_seconds']:.0f} s of CPU. Open {folder / 'report.html'}",
        highlight=False,
        soft_wrap=True,
    )
