"""The options of the commands: names, types and help texts; no meaning yet."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from refluence.cli.root import remember_debug

_WHAT = "What to explain"
_HOW = "How to compute it"
_SET = "Settings of a solver"
_SHOW = "What comes out"
_TEST = "What it is tested against"


class CurvatureName(StrEnum):
    """The matrices C."""

    FISHER = "fisher"
    GGN = "ggn"
    HESSIAN = "hessian"
    TRUE_FISHER = "true_fisher"
    MC_FISHER = "mc_fisher"


class SolverName(StrEnum):
    """The ways of applying (C + λI)⁻¹."""

    AUTO = "auto"
    GRAM = "gram"
    DENSE = "dense"
    CG = "cg"
    LISSA = "lissa"
    ARNOLDI = "arnoldi"
    NYSTROEM = "nystroem"
    HARMONIC_MEAN = "harmonic-mean"
    KFAC = "kfac"
    EKFAC = "ekfac"
    SKETCHED = "sketched"
    IDENTITY = "identity"


class PreconditionerName(StrEnum):
    """The preconditioners of conjugate gradients."""

    JACOBI = "jacobi"
    NYSTROEM = "nystroem"
    KFAC = "kfac"
    EKFAC = "ekfac"


class SharingName(StrEnum):
    """What K-FAC makes of a weight that an example uses several times."""

    EXPAND = "expand"
    REDUCE = "reduce"


class SketchName(StrEnum):
    """The random projections."""

    SJLT = "sjlt"
    GAUSSIAN = "gaussian"
    RADEMACHER = "rademacher"
    TENSOR = "tensor"
    KRONECKER = "kronecker"


class DtypeName(StrEnum):
    """The floating-point types in which the whole attribution can run."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"


Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset", help="A built-in data set, such as digits; refluence data list shows all.", rich_help_panel=_WHAT
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="A built-in model, such as mlp, lr or cnn; refluence data list shows those of each set.",
        rich_help_panel=_WHAT,
    ),
]
TaskFunction = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="MODULE:FUNCTION",
        help="Your own: package.module:function or file.py:function, which returns (task, train, test).",
        rich_help_panel=_WHAT,
    ),
]
TestRows = Annotated[
    str,
    typer.Option(
        "--test-rows",
        metavar="ROWS",
        help="Test rows to explain: 0:12, 3,17,99, errors (the misclassified ones), all, or several of these.",
        rich_help_panel=_WHAT,
    ),
]
LabelNoise = Annotated[
    float,
    typer.Option(
        "--label-noise",
        help="Share of built-in train labels made wrong on purpose before training.",
        min=0.0,
        max=1.0,
        rich_help_panel=_WHAT,
    ),
]
L2 = Annotated[
    float | None,
    typer.Option(
        "--l2",
        help="Weight decay of a built-in model's training; default its recipe's.",
        min=0.0,
        rich_help_panel=_WHAT,
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        "--epochs",
        metavar="N",
        help="Train a built-in model for so many epochs instead of as long as its recipe says.",
        min=1,
        rich_help_panel=_WHAT,
    ),
]
TrainSize = Annotated[
    int | None,
    typer.Option("--n-train", help="Use the first so many train rows of a built-in set.", rich_help_panel=_WHAT),
]
TestSize = Annotated[
    int | None,
    typer.Option("--n-test", help="Use the first so many test rows of a built-in set.", rich_help_panel=_WHAT),
]
Retrain = Annotated[
    bool, typer.Option("--retrain", help="Train a built-in model again even if it is cached.", rich_help_panel=_WHAT)
]

Curvature = Annotated[
    CurvatureName,
    typer.Option(
        "--curvature",
        help="C: the empirical Fisher, the Gauss-Newton matrix, the Hessian, or the Fisher over the model's own "
        "labels, exact or sampled.",
        rich_help_panel=_HOW,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples", metavar="N", help="Labels drawn an example for mc_fisher; default 2.", min=1, rich_help_panel=_HOW
    ),
]
Solver = Annotated[
    SolverName,
    typer.Option(
        "--solver",
        metavar="SOLVER",
        help=f"How (C + λI)⁻¹ is applied: {', '.join(SolverName)}.",
        rich_help_panel=_HOW,
    ),
]
Sketch = Annotated[
    SketchName | None,
    typer.Option(
        "--sketch",
        help="Random projection of the sketched solver, default sjlt; of kfac and ekfac only kronecker.",
        rich_help_panel=_SET,
    ),
]
SketchSize = Annotated[
    int | None,
    typer.Option(
        "--sketch-size",
        metavar="M",
        help="Its size; default 4096. Of kronecker a square: 4096 is 64 for each factor.",
        min=1,
        rich_help_panel=_SET,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank",
        metavar="R",
        help="Of arnoldi, nystroem, and of cg's nystroem preconditioner.",
        min=1,
        rich_help_panel=_SET,
    ),
]
Rtol = Annotated[
    float | None,
    typer.Option("--rtol", help="Relative residual at which cg is done; default 1e-6.", rich_help_panel=_SET),
]
Maxiter = Annotated[
    int | None, typer.Option("--maxiter", metavar="N", help="Most steps of cg; default 1000.", rich_help_panel=_SET)
]
Preconditioner = Annotated[
    PreconditionerName | None, typer.Option("--preconditioner", help="Of cg; default none.", rich_help_panel=_SET)
]
Depth = Annotated[
    int | None,
    typer.Option("--depth", metavar="N", help="Steps of lissa; default from the spectrum.", rich_help_panel=_SET),
]
Scale = Annotated[
    float | None,
    typer.Option("--scale", help="Scale of lissa; default from the largest eigenvalue.", rich_help_panel=_SET),
]
Repeats = Annotated[
    int | None,
    typer.Option(
        "--repeats",
        metavar="N",
        help="Recursions of lissa, or independent sketches, that are averaged.",
        rich_help_panel=_SET,
    ),
]
StepRows = Annotated[
    int | None,
    typer.Option("--step-rows", metavar="N", help="Random rows of a step of lissa; default all.", rich_help_panel=_SET),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        help="Of lissa's truncation (default 1e-2) or arnoldi's eigenpairs (1e-3).",
        rich_help_panel=_SET,
    ),
]
Sharing = Annotated[
    SharingName | None,
    typer.Option(
        "--sharing",
        help="Of kfac and ekfac, for weights used at several positions; default expand.",
        rich_help_panel=_SET,
    ),
]
Damping = Annotated[
    str,
    typer.Option(
        "--damping",
        metavar="λ",
        help="auto, a number, relative:C (C × mean eigenvalue) or dim:K (the λ with effective dimension K).",
        rich_help_panel=_HOW,
    ),
]
Accuracy = Annotated[
    float | None,
    typer.Option(
        "--accuracy",
        metavar="ε",
        help="Let the sketch grow until the error of the scores is ε of their size for 95 % of the tests; auto may "
        "take an exact solver.",
        rich_help_panel=_HOW,
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps; default: the model's.", rich_help_panel=_HOW)
]
Dtype = Annotated[
    DtypeName | None,
    typer.Option("--dtype", help="Run the whole attribution in this type.", rich_help_panel=_HOW),
]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", help="Rows a batch; changes no score.", min=1, rich_help_panel=_HOW)
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Memory that may be used, such as 8GB; with --scheduler by each worker.",
        rich_help_panel=_HOW,
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", help="Of training, label noise, sketches and sampled labels.", min=0, rich_help_panel=_HOW),
]

SkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad",
        help="Leave out train rows that cannot be read, that the model fails on or whose gradient is not finite; "
        "default: stop at the first.",
        rich_help_panel=_HOW,
    ),
]

Verify = Annotated[
    int,
    typer.Option(
        "--verify",
        metavar="M",
        help="Really remove M train rows, refit, and set the measured changes against the predictions.",
        min=0,
        rich_help_panel=_SHOW,
    ),
]

Certify = Annotated[
    bool,
    typer.Option(
        "--certify",
        help="Measure the error of the scores against exact ones, and bound it where it can be bounded.",
        rich_help_panel=_SHOW,
    ),
]

Methods = Annotated[
    str | None,
    typer.Option(
        "--methods",
        metavar="LIST",
        help="Several at once, each CURVATURE:SOLVER[:DAMPING]: ggn:cg,fisher:gram,mc_fisher:ekfac:1e-3.",
        rich_help_panel=_HOW,
    ),
]
Metrics = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="LIST",
        help="lds, loo, mislabel, removal, brittleness, tail-patch, retrieval, randomisation, or all; default: those "
        "that apply, without removal and brittleness, which retrain for every method.",
        rich_help_panel=_TEST,
    ),
]
Subsets = Annotated[
    int,
    typer.Option(
        "--subsets", metavar="M", help="Random halves of the data to retrain on, for lds.", rich_help_panel=_TEST
    ),
]
Seeds = Annotated[
    int,
    typer.Option("--seeds", metavar="S", help="Models trained on each subset, averaged.", min=1, rich_help_panel=_TEST),
]
Removals = Annotated[
    int,
    typer.Option("--removals", metavar="M", help="Rows left out one by one, for loo.", min=3, rich_help_panel=_TEST),
]
Baselines = Annotated[
    str | None,
    typer.Option(
        "--baselines",
        metavar="LIST",
        help="random, loss, dot, cosine, neighbours, or none; default all.",
        rich_help_panel=_TEST,
    ),
]
TuneDamping = Annotated[
    bool,
    typer.Option(
        "--tune-damping",
        help="Choose λ by LDS on a tenth of the test rows; report on the others only.",
        rich_help_panel=_HOW,
    ),
]

SaveFit = Annotated[
    Path | None,
    typer.Option(
        "--save-fit", metavar="FOLDER", help="Keep the fit there, for --fit.", file_okay=False, rich_help_panel=_SHOW
    ),
]
SavedFit = Annotated[
    Path | None,
    typer.Option(
        "--fit",
        metavar="FOLDER",
        help="Score with a fit that --save-fit kept, instead of fitting.",
        file_okay=False,
        rich_help_panel=_HOW,
    ),
]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.", file_okay=False, rich_help_panel=_SHOW)]
Top = Annotated[int, typer.Option("--top", help="Train rows listed for each test row.", min=1, rich_help_panel=_SHOW)]
NoReport = Annotated[bool, typer.Option("--no-report", help="Leave report.html out.", rich_help_panel=_SHOW)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.", rich_help_panel=_SHOW)]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", help="Show the traceback of an error.", callback=remember_debug, is_eager=True, expose_value=False
    ),
]
