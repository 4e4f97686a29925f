"""`refluence study barrier`, `leakage`, `certificate` and `factorized-edim`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from refluence.cli import options as o
from refluence.cli import projection as p
from refluence.cli.root import examples
from refluence.cli.study import StudyCommand, app

_FACTORS = "Factorised sketches"


def _problem(given: dict[str, Any]) -> Any:
    names = (
        "dataset", "model", "n_train", "n_test", "num_test_grads", "epochs", "model_seed", "dtype", "device",
        "batch_size", "rank_cut",
    )  # fmt: skip
    return p.problem_options(**{name: given[name] for name in names})


def _tell(summary: dict[str, Any], columns: dict[str, str], last: str) -> None:
    console = Console()
    p.print_columns(console, summary, columns)
    console.print(last, highlight=False, soft_wrap=True)


@app.command(
    "barrier",
    cls=StudyCommand,
    epilog=examples(("refluence study barrier --dataset digits --out barrier", "a quick one, without a download")),
)
def barrier(
    dataset: p.Dataset = "mnist",
    model: p.Model = "mlp",
    num_test_grads: p.NumTestGrads = 500,
    ratio_max: Annotated[float, p.option("ratio-max", "Largest size, in ranks.", "The grid", min=0.01)] = 1.2,
    ratio_steps: Annotated[
        int, p.option("ratio-steps", "Sizes up to it; the rank and its neighbours are added.", "The grid", min=1)
    ] = 12,
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
    offload: p.Offload = p.OffloadName.CPU,
    cache_dir: p.CacheDir = None,
    batch_size: p.BatchSize = 256,
    device: p.Device = None,
    out: p.Out = None,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Error of undamped scores against m over the rank (Theorem 1 of arXiv 2602.10449)."""
    from refluence.studies.projection.barrier import Barrier, run

    sketching = p.sketching_options(proj_type, num_trials, seed, gram_space, offload)
    folder = p.place(out, "barrier", dataset, model, proj_type.value)
    summary = run(
        Barrier(_problem(locals()), sketching, ratio_max, ratio_steps), folder, cache_dir=cache_dir, progress=not quiet
    )
    if not quiet:
        columns = {
            "m": "m", "lost": "directions lost", "self_mean": "self-influence lost", "self_max": "largest",
            "eps_95": "95 % error", "eps_max": "largest error",
        }  # fmt: skip
        _tell(
            summary,
            columns,
            f"Rank {summary['rank']}. {summary['cpu_seconds']:.0f} s of CPU. Open {folder / 'report.html'}",
        )


@app.command(
    "leakage",
    cls=StudyCommand,
    epilog=examples(("refluence study leakage --dataset digits --out leakage", "a quick one, without a download")),
)
def leakage(
    dataset: p.Dataset = "mnist",
    model: p.Model = "mlp",
    num_test_grads: p.NumTestGrads = 500,
    min_d_lambda: p.MinDLambda = 1.0,
    factor_rows: Annotated[int, p.option("factor-rows", "Train rows of the factors A and E.", _FACTORS, min=1)] = 32,
    factor_tests: Annotated[int, p.option("factor-tests", "Tests.", _FACTORS, min=1)] = 50,
    factor_exp_min: Annotated[int, p.option("factor-exp-min", "Smallest m_A and m_E, 2 to this.", _FACTORS, min=0)] = 3,
    factor_exp_max: Annotated[int, p.option("factor-exp-max", "Largest m_A and m_E, 2 to this.", _FACTORS, min=0)] = 7,
    factor_draws: Annotated[
        int, p.option("factor-draws", "Sketches of each pair of sizes; 0: leave this part out.", _FACTORS, min=0)
    ] = 100,
    factor_damping: Annotated[float, p.option("factor-damping", "λ as a share of ‖A‖‖E‖.", _FACTORS)] = 1e-2,
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
    m_exp_max: p.MaxExp = 12,
    m_steps: p.MSteps = 0,
    lambda_exp_min: p.LambdaMin = -4,
    lambda_exp_max: p.LambdaMax = 0,
    lambda_steps: p.LambdaSteps = 0,
    offload: p.Offload = p.OffloadName.CPU,
    cache_dir: p.CacheDir = None,
    batch_size: p.BatchSize = 256,
    device: p.Device = None,
    out: p.Out = None,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Leakage of test gradients out of range, measured against predicted (Theorems 8 and 9 of arXiv 2602.10449)."""
    from refluence.studies.projection.factor_leakage import FactorGrid
    from refluence.studies.projection.leakage import Leakage, run

    sizes, dampings = p.grid_options((m_exp_min, m_exp_max, m_steps), (lambda_exp_min, lambda_exp_max, lambda_steps))
    sketching = p.sketching_options(proj_type, num_trials, seed, gram_space, offload)
    factors = FactorGrid(factor_rows, factor_tests, factor_exp_min, factor_exp_max, factor_draws, factor_damping)
    folder = p.place(out, "leakage", dataset, model, proj_type.value)
    options = Leakage(_problem(locals()), sketching, sizes, dampings, min_d_lambda, factors)
    summary = run(options, folder, cache_dir=cache_dir, progress=not quiet)
    if not quiet:
        columns = {
            "damping": "λ", "effective_dimension": "d_λ", "ratio": "measured ÷ predicted", "covered": "within 1.96",
            "over_scores": "leakage ÷ scores", "slope": "slope in m",
        }  # fmt: skip
        more = ""
        if "factorised_ratio_smallest" in summary:
            more = (
                f"Factorised: measured ÷ predicted {summary['factorised_ratio_smallest']:.3f} to "
                f"{summary['factorised_ratio_largest']:.3f}. "
            )
        _tell(summary, columns, f"{more}{summary['cpu_seconds']:.0f} s of CPU. Open {folder / 'report.html'}")


@app.command(
    "certificate",
    cls=StudyCommand,
    epilog=examples(
        ("refluence study certificate --dataset digits --num_trials 50 --out certificate", "a quick one"),
        ("refluence study certificate --model lr --proj_type sjlt", "sparse sketches, softmax regression on MNIST"),
    ),
)
def certificate(
    dataset: p.Dataset = "mnist",
    model: p.Model = "mlp",
    num_test_grads: p.NumTestGrads = 200,
    dimension: Annotated[float, p.option("dimension", "d_κ of the damping.", "The grid", min=1.0)] = 60.0,
    ratios: Annotated[str, p.option("ratios", "Sketch sizes over d_κ, by commas.", "The grid")] = "1.5,2,4,8",
    n_train: p.NTrain = 600,
    n_test: p.NTest = None,
    epochs: p.Epochs = None,
    model_seed: p.ModelSeed = 0,
    dtype: p.Dtype = o.DtypeName.FLOAT64,
    rank_cut: p.RankCut = 1e-10,
    proj_type: p.ProjType = p.ProjectionName.NORMAL,
    gram_space: p.GramSpace = True,
    num_trials: p.NumTrials = 200,
    seed: p.Seed = 42,
    offload: p.Offload = p.OffloadName.CPU,
    cache_dir: p.CacheDir = None,
    batch_size: p.BatchSize = 256,
    device: p.Device = None,
    out: p.Out = None,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Coverage of standard errors, certain bounds and order statistics over many sketches."""
    from refluence.studies.projection.certificate import CertificateStudy, run

    try:
        sizes = tuple(float(part) for part in ratios.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{ratios!r} is no list such as 1.5,2,4,8", param_hint="--ratios") from error
    sketching = p.sketching_options(proj_type, num_trials, seed, gram_space, offload)
    folder = p.place(out, "certificate", dataset, model, proj_type.value)
    options = CertificateStudy(_problem(locals()), sketching, dimension, sizes)
    summary = run(options, folder, cache_dir=cache_dir, progress=not quiet)
    if not quiet:
        columns = {
            "m": "m", "m_over_d": "m/d_κ", "covered": "95 % intervals hold", "spread": "error ÷ its error",
            "error": "error ÷ scores", "factor": "factor", "bound": "certain ÷ scores", "held": "order statistic holds",
        }  # fmt: skip
        _tell(
            summary,
            columns,
            f"{summary['violations']} of {summary['pairs']:,} pairs outside a certain bound. "
            f"{summary['cpu_seconds']:.0f} s of CPU. Open {folder / 'report.html'}",
        )


@app.command(
    "factorized-edim",
    cls=StudyCommand,
    epilog=examples(("refluence study factorized-edim --model mlp --compute_full_fisher", "with the whole Fisher too")),
)
def factorized_edim(
    dataset: p.Dataset = "mnist",
    model: p.Model = "lr",
    compute_full_fisher: Annotated[
        bool,
        typer.Option("--compute-full-fisher", help="Also d_λ of the whole Fisher.", rich_help_panel="What to study"),
    ] = False,
    n_train: p.NTrain = None,
    n_test: p.NTest = None,
    epochs: p.Epochs = None,
    model_seed: p.ModelSeed = 0,
    dtype: p.Dtype = o.DtypeName.FLOAT64,
    lambda_exp_min: p.LambdaMin = -8,
    lambda_exp_max: p.LambdaMax = 2,
    lambda_steps: p.LambdaSteps = 0,
    cache_dir: p.CacheDir = None,
    batch_size: p.BatchSize = 256,
    device: p.Device = None,
    out: p.Out = None,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Effective dimension of factorised and unstructured sketches by layer (Remark 7 of arXiv 2602.10449)."""
    from refluence.studies.projection.factorized_edim import FactorizedEdim, run

    given = locals() | {"num_test_grads": 500, "rank_cut": 1e-10}
    _, dampings = p.grid_options((0, 0, 0), (lambda_exp_min, lambda_exp_max, lambda_steps))
    folder = p.place(out, "factorized_edim", dataset, model)
    options = FactorizedEdim(_problem(given), dampings, compute_full_fisher)
    summary = run(options, folder, cache_dir=cache_dir, progress=not quiet)
    if not quiet:
        columns = {"damping": "λ", "unstructured": "Σ d_λ(A⊗E)", "factorised": "Σ of products", "ratio": "ratio"}
        if compute_full_fisher:
            columns["full_fisher"] = "d_λ(F)"
        _tell(summary, columns, f"{summary['cpu_seconds']:.0f} s of CPU. Open {folder / 'report.html'}")
