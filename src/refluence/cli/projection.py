"""`refluence study spectrum-bounds` and its sisters: the published options, with the published defaults."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from refluence.cli import options as o
from refluence.cli.root import examples
from refluence.cli.study import StudyCommand, app

if TYPE_CHECKING:
    from refluence.studies.projection.grid import Dampings, Sizes, Sketching
    from refluence.studies.projection.problem import ProblemOptions

_WHAT, _SKETCH, _GRID, _RUN = "What to study", "Sketches", "The grid", "How it runs"


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


def option(name: str, text: str, panel: str, **more: Any) -> Any:
    """An option with its help, in a panel."""
    return typer.Option(f"--{name}", help=text, rich_help_panel=panel, **more)


Dataset = Annotated[str, option("dataset", "mnist, cifar2, maestro, digits, or another built-in set.", _WHAT)]
Model = Annotated[str, option("model", "lr, mlp, resnet9, musictransformer, …", _WHAT)]
NumTestGrads = Annotated[int, option("num-test-grads", "Test gradients.", _WHAT, min=1)]
NTrain = Annotated[int | None, option("n-train", "Train rows; default the published number.", _WHAT, min=2)]
NTest = Annotated[int | None, option("n-test", "Test rows; default the published number.", _WHAT, min=1)]
Epochs = Annotated[int | None, option("epochs", "Of training; default the recipe's.", _WHAT, min=1)]
ModelSeed = Annotated[int, option("model-seed", "Of training.", _WHAT, min=0)]
Dtype = Annotated[o.DtypeName, option("dtype", "Of the gradients; inner products are float64 always.", _WHAT)]
RankCut = Annotated[
    float, option("rank-cut", "Eigenvalues above this share of the largest count for τ_0.", _WHAT, min=0.0, max=0.99)
]
MinDLambda = Annotated[
    float, option("min-d-lambda", "Leave out dampings of a smaller effective dimension.", _WHAT, min=0.0)
]
ProjType = Annotated[ProjectionName, option("proj-type", "The random projection.", _SKETCH)]
GramSpace = Annotated[
    bool,
    typer.Option(
        "--gram-space/--no-gram-space",
        help="Draw normal sketches of the Gram matrix (the same law), or of the gradients.",
        rich_help_panel=_SKETCH,
    ),
]
NumTrials = Annotated[int, option("num-trials", "Independent sketches of each size.", _SKETCH, min=1)]
Seed = Annotated[int, option("seed", "Of the first trial's sketch and of splits.", _SKETCH, min=0)]
MinExp = Annotated[int, option("m-exp-min", "Smallest size, 2 to this power.", _GRID, min=0)]
MaxExp = Annotated[int, option("m-exp-max", "Largest size, 2 to this power; d and more are left out.", _GRID, min=0)]
MSteps = Annotated[int, option("m-steps", "Sizes, equally spaced in log m; 0: every power of two.", _GRID, min=0)]
LambdaMin = Annotated[int, option("lambda-exp-min", "Smallest λ, 10 to this power.", _GRID)]
LambdaMax = Annotated[int, option("lambda-exp-max", "Largest λ, 10 to this power.", _GRID)]
LambdaSteps = Annotated[
    int, option("lambda-steps", "Dampings, equally spaced in log λ; 0: every power of ten.", _GRID, min=0)
]
Offload = Annotated[
    OffloadName,
    option("offload", "Where the rows that a projection of the gradients gives are kept between sizes.", _RUN),
]
CacheDir = Annotated[
    Path | None,
    option("cache-dir", "Folder for spectra that studies share, and for --offload disk.", _RUN, file_okay=False),
]
BatchSize = Annotated[int, option("batch-size", "Rows a forward pass; changes no number.", _RUN, min=1)]
Device = Annotated[str | None, option("device", "cpu, cuda, cuda:1; default cpu.", _RUN)]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "--output-dir",
        help="Folder for the results; default results/STUDY/DATASET_MODEL_….",
        file_okay=False,
        rich_help_panel=_RUN,
    ),
]


def problem_options(**given: Any) -> ProblemOptions:
    """The problem that the options name."""
    from refluence.studies.projection.problem import ProblemOptions

    return ProblemOptions(**{**given, "dtype": given["dtype"].value})


def grid_options(m: tuple[int, int, int], dampings: tuple[int, int, int]) -> tuple[Sizes, Dampings]:
    """The sizes and dampings that the options name."""
    from refluence.studies.projection.grid import Dampings, Sizes

    return Sizes(*m), Dampings(*dampings)


def sketching_options(
    proj_type: ProjectionName, num_trials: int, seed: int, gram_space: bool, offload: OffloadName
) -> Sketching:
    """The sketches that the options name."""
    from refluence.studies.projection.grid import Sketching

    return Sketching(proj_type.value, num_trials, seed, gram_space, offload.value)


def place(out: Path | None, study: str, *parts: str) -> Path:
    """The folder of the results."""
    return out or Path("results") / study / "_".join(parts)


@app.command(
    "spectrum-bounds",
    cls=StudyCommand,
    epilog=examples(
        ("refluence study spectrum-bounds --dataset digits --out sb", "a quick one, without a download"),
        ("refluence study spectrum-bounds --model lr --test_mode test", "the paper's Figure 2, softmax regression"),
        ("refluence study spectrum-bounds --proj_type sjlt --m_exp_max 12", "sparse sketches of the gradients"),
    ),
)
def spectrum_bounds(
    dataset: Dataset = "mnist",
    model: Model = "mlp",
    test_mode: Annotated[
        TestModeName,
        option("test-mode", "self: self-influence; test: every pair of a train and a test row.", _WHAT),
    ] = TestModeName.SELF,
    num_test_grads: NumTestGrads = 500,
    min_d_lambda: MinDLambda = 1.0,
    corrected: Annotated[
        bool,
        typer.Option(
            "--corrected/--no-corrected",
            help="Also the scores corrected for the damping that a sketch adds.",
            rich_help_panel=_WHAT,
        ),
    ] = True,
    n_train: NTrain = None,
    n_test: NTest = None,
    epochs: Epochs = None,
    model_seed: ModelSeed = 0,
    dtype: Dtype = o.DtypeName.FLOAT64,
    rank_cut: RankCut = 1e-10,
    proj_type: ProjType = ProjectionName.NORMAL,
    gram_space: GramSpace = True,
    num_trials: NumTrials = 5,
    seed: Seed = 42,
    m_exp_min: MinExp = 2,
    m_exp_max: MaxExp = 20,
    m_steps: MSteps = 0,
    lambda_exp_min: LambdaMin = -8,
    lambda_exp_max: LambdaMax = 2,
    lambda_steps: LambdaSteps = 0,
    offload: Offload = OffloadName.CPU,
    cache_dir: CacheDir = None,
    batch_size: BatchSize = 256,
    device: Device = None,
    out: Out = None,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Error of sketched scores against m/d_λ (Figures 1 and 2 of arXiv 2602.10449)."""
    from refluence.studies.projection.spectrum_bounds import SpectrumBounds, run

    problem = problem_options(
        dataset=dataset, model=model, n_train=n_train, n_test=n_test, num_test_grads=num_test_grads, epochs=epochs,
        model_seed=model_seed, dtype=dtype, device=device, batch_size=batch_size, rank_cut=rank_cut,
    )  # fmt: skip
    sizes, dampings = grid_options((m_exp_min, m_exp_max, m_steps), (lambda_exp_min, lambda_exp_max, lambda_steps))
    sketching = sketching_options(proj_type, num_trials, seed, gram_space, offload)
    options = SpectrumBounds(problem, sketching, sizes, dampings, test_mode.value, min_d_lambda, corrected)
    folder = place(out, "spectrum_bounds", dataset, model, proj_type.value, test_mode.value)
    summary = run(options, folder, cache_dir=cache_dir, progress=not quiet)
    if not quiet:
        _print_spectrum(Console(), summary, folder)


def _print_spectrum(console: Console, summary: dict[str, Any], out: Path) -> None:
    measure = summary["measure"]
    columns = {
        "damping": "λ",
        "effective_dimension": "d_λ",
        f"{measure}_plateau": "plateau",
        f"{measure}_over_plateau_at_10": "@10",
        f"{measure}_over_plateau_at_100": "@100",
        f"{measure}_bump": "bump",
        f"{measure}_slope": "slope",
        f"{measure}_corrected_over_plateau_at_10": "corr. @10",
        f"{measure}_corrected_slope": "slope",
    }
    print_columns(console, summary, {key: title for key, title in columns.items() if key in summary})
    console.print(
        "@10, @100 and the bump: 95 % error at that m/d_λ, in plateaus (the error without any sketch). "
        f"{summary['cpu_seconds']:.0f} s of CPU. Open {out / 'report.html'}",
        highlight=False,
        soft_wrap=True,
    )


def print_columns(console: Console, summary: dict[str, Any], columns: dict[str, str]) -> None:
    """Lists of a summary side by side."""
    from refluence.studies.projection.output import short

    table = Table(*(title for title in columns.values()), box=None, pad_edge=False)
    for values in zip(*(summary[key] for key in columns), strict=True):
        table.add_row(*map(short, values))
    console.print(table)
