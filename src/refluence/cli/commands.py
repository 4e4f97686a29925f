"""The commands: parse, call, print. What a command needs is imported when it runs, so that help is quick."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from refluence._version import __version__
from refluence.cli import execution_options as e
from refluence.cli import leverage as leverage_command
from refluence.cli import leverage_basis, projection  # noqa: F401  (they add commands to `study`)
from refluence.cli import options as o
from refluence.cli import scale as of_scale
from refluence.cli.data import app as data_app
from refluence.cli.root import Command, Root, examples
from refluence.cli.store import app as store_app
from refluence.cli.study import app as study_app

if TYPE_CHECKING:
    from refluence.cli.solver import SolverChoice

app = typer.Typer(
    cls=Root,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        ("refluence demo", "find wrong labels among 1,437 digits, with a report"),
        ("refluence attribute --dataset digits --model mlp --out results", "explain a built-in model"),
        ("refluence attribute --task my_model.py:influence_task --out results", "explain your own"),
        ("refluence evaluate --dataset digits --model lr --out tested", "test attributions against retraining"),
        ("refluence leverage --dataset digits --out unusual", "which rows are unlike the others"),
        ("refluence COMMAND --help", "options and examples of a command"),
    ),
)
app.add_typer(data_app, name="data")
app.add_typer(store_app, name="store")
app.add_typer(study_app, name="study")


def _version(value: bool) -> bool:
    if value:
        typer.echo(f"refluence {__version__}")
        raise typer.Exit
    return value


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: o.Debug = False,
) -> None:
    """Which training examples made the model do that, and can you trust the answer?"""


@app.command(
    cls=Command,
    epilog=examples(
        ("refluence attribute --dataset digits --model mlp --out results", "twelve test rows, exact"),
        ("refluence attribute --dataset mnist --out results --test-rows errors", "every misclassified row"),
        ("refluence attribute --task package.module:function --out results", "your model and data"),
        ("refluence attribute --dataset mnist --out results --curvature ggn --solver cg", "Gauss-Newton"),
        ("refluence attribute --dataset mnist --out results --solver sketched --sketch-size 4096", "by a sketch"),
        (
            "refluence attribute --dataset mnist --out results --accuracy 0.1 --certify",
            "as accurate as asked, and checked",
        ),
        ("refluence attribute --dataset mnist --out results --solver sketched --store kept", "keep the gradients"),
        ("refluence attribute --dataset mnist --out results --scheduler local", "a worker on every core"),
        ("refluence attribute --dataset mnist --out results --save-fit mnist-fit", "keep the fit"),
        ("refluence attribute --dataset mnist --out more --fit mnist-fit --test-rows 12:24", "and use it again"),
        ("refluence attribute --dataset digits --out results --damping dim:90", "λ by effective dimension"),
        ("refluence attribute --dataset digits --out results --verify 8", "remove eight rows and compare"),
    ),
)
def attribute(
    ctx: typer.Context,
    *,
    dataset: o.Dataset = None,
    model: o.Model = "mlp",
    task: o.TaskFunction = None,
    test_rows: o.TestRows = "0:12",
    label_noise: o.LabelNoise = 0.0,
    l2: o.L2 = None,
    n_train: o.TrainSize = None,
    n_test: o.TestSize = None,
    epochs: o.Epochs = None,
    retrain: o.Retrain = False,
    curvature: o.Curvature = o.CurvatureName.FISHER,
    samples: o.Samples = None,
    solver: o.Solver = o.SolverName.AUTO,
    sketch: o.Sketch = None,
    sketch_size: o.SketchSize = None,
    rank: o.Rank = None,
    rtol: o.Rtol = None,
    maxiter: o.Maxiter = None,
    preconditioner: o.Preconditioner = None,
    depth: o.Depth = None,
    scale: o.Scale = None,
    repeats: o.Repeats = None,
    step_rows: o.StepRows = None,
    tolerance: o.Tolerance = None,
    sharing: o.Sharing = None,
    damping: o.Damping = "auto",
    accuracy: o.Accuracy = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    batch_size: o.BatchSize = None,
    memory: o.Memory = None,
    seed: o.Seed = 0,
    skip_bad: o.SkipBad = False,
    store: e.Store = None,
    offload: e.Offload = e.OffloadName.NONE,
    store_dtype: e.StoreDtype = None,
    shard_rows: e.ShardRows = None,
    scheduler: e.Scheduler = None,
    fit: o.SavedFit = None,
    out: o.Out,
    save_fit: o.SaveFit = None,
    verify: o.Verify = 0,
    certify: o.Certify = False,
    top: o.Top = 8,
    no_report: o.NoReport = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Find the train rows that helped and hurt each prediction; writes scores, tables and a report."""
    from refluence.cli import explanation, rows
    from refluence.cli.method import Method, parse_damping
    from refluence.cli.output_folder import OutputFolder
    from refluence.cli.problem import Source
    from refluence.cli.summary import print_explanation, print_files
    from refluence.persistence import check_folder

    folder = OutputFolder(out)
    folder.check()
    source = Source(dataset, model, task, seed, label_noise, l2, n_train, n_test, retrain, epochs)
    method = Method(
        curvature,
        samples,
        _solver(ctx),
        damping,
        device,
        dtype,
        batch_size,
        _execution(ctx),
        seed,
        not quiet,
        accuracy,
    )
    source.check()
    method.check()
    if verify == 1:
        raise typer.BadParameter("removes two rows at the least: one has no slope", param_hint="--verify")
    if fit is not None:
        _refuse_beside_a_fit(ctx)
    if save_fit is not None:
        check_folder(save_fit)
    problem = source.load(progress=not quiet)
    chosen = rows.parse_rows(
        test_rows, rows.count_rows(problem.test), lambda: rows.misclassified(problem.task, problem.test)
    )
    folder.begin("attribute")
    with folder.marked():
        if fit is None:
            done = explanation.explain(problem, method, chosen, save_fit)
        else:
            other = parse_damping(damping) if _by_hand(ctx, "damping") else None
            done = explanation.explain_again(problem, fit, chosen, other)
        if verify:
            done = explanation.verified(done, verify, seed=seed, progress=not quiet)
        if certify:
            done = explanation.certified(done)
        explanation.write(done, folder, command="attribute", options=given(ctx), top=top, report=not no_report)
    if not quiet:
        console = Console()
        print_explanation(console, done, explanation.top_frame(done.scores, 1))
        print_files(console, folder)


@app.command(
    cls=Command,
    epilog=examples(
        ("refluence plan --dataset mnist --model mlp", "what auto chooses, and why"),
        ("refluence plan --dataset mnist --solver dense", "whether another solver would fit"),
        ("refluence plan --task my_model.py:influence_task --memory 4GB", "your model in 4 GB"),
        (
            "refluence plan --examples 1e9 --parameters 70e9 --tokens 2048 --sketch kronecker --workers 64",
            "hours, bytes and shards of a job of any size",
        ),
    ),
)
def plan(
    ctx: typer.Context,
    *,
    dataset: o.Dataset = None,
    model: o.Model = "mlp",
    task: o.TaskFunction = None,
    test_rows: o.TestRows = "0:12",
    l2: o.L2 = None,
    n_train: o.TrainSize = None,
    n_test: o.TestSize = None,
    curvature: o.Curvature = o.CurvatureName.FISHER,
    samples: o.Samples = None,
    solver: o.Solver = o.SolverName.AUTO,
    sketch: o.Sketch = None,
    sketch_size: o.SketchSize = None,
    rank: o.Rank = None,
    rtol: o.Rtol = None,
    maxiter: o.Maxiter = None,
    preconditioner: o.Preconditioner = None,
    depth: o.Depth = None,
    scale: o.Scale = None,
    repeats: o.Repeats = None,
    step_rows: o.StepRows = None,
    tolerance: o.Tolerance = None,
    sharing: o.Sharing = None,
    damping: o.Damping = "auto",
    accuracy: o.Accuracy = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    batch_size: o.BatchSize = None,
    memory: o.Memory = None,
    offload: e.Offload = e.OffloadName.NONE,
    scheduler: e.Scheduler = None,
    seed: o.Seed = 0,
    examples: of_scale.Examples = None,
    parameters: of_scale.Parameters = None,
    tokens: of_scale.Tokens = None,
    tests: of_scale.Tests = None,
    per_layer: of_scale.PerLayer = False,
    store_dtype: of_scale.StoreDtype = None,
    workers: of_scale.Workers = None,
    device_rate: of_scale.DeviceRate = None,
    utilisation: of_scale.Utilisation = None,
    debug: o.Debug = False,
) -> None:
    """Show what would be computed, the memory and time it takes, and why; nothing is trained or computed."""
    if of_scale.asked(ctx):
        of_scale.print_plan(ctx)
        return
    from refluence.cli import rows
    from refluence.cli.method import Method
    from refluence.cli.problem import Source

    source = Source(dataset, model, task, seed, l2=l2, n_train=n_train, n_test=n_test)
    method = Method(
        curvature, samples, _solver(ctx), damping, device, dtype, batch_size, _execution(ctx), seed, accuracy=accuracy
    )
    source.check()
    method.check()
    problem = source.load_untrained()
    total = rows.count_rows(problem.test)
    # which rows are wrong is known only after training: as many as there are, at most
    chosen = rows.parse_rows(test_rows, total, lambda: list(range(total)))
    found = method.influence(problem.task).plan_for(problem.train, n_test=len(chosen))
    Console().print(escape(found.summary()), highlight=False, soft_wrap=True)
    found.check()


@app.command(
    cls=Command,
    epilog=examples(
        ("refluence evaluate --dataset digits --model lr --out results --subsets 20", "with 20 retrainings"),
        (
            "refluence evaluate --dataset digits --out results --methods ggn:cg,fisher:gram --tune-damping",
            "two methods, λ chosen on held-out rows",
        ),
        ("refluence evaluate --dataset digits --out results --label-noise 0.1 --metrics mislabel", "find wrong labels"),
        ("refluence evaluate --task my_model.py:influence_task --out results --metrics lds", "your model and data"),
    ),
)
def evaluate(
    ctx: typer.Context,
    *,
    dataset: o.Dataset = None,
    model: o.Model = "mlp",
    task: o.TaskFunction = None,
    test_rows: o.TestRows = "all",
    label_noise: o.LabelNoise = 0.0,
    l2: o.L2 = None,
    n_train: o.TrainSize = None,
    n_test: o.TestSize = None,
    epochs: o.Epochs = None,
    retrain: o.Retrain = False,
    metrics: o.Metrics = None,
    subsets: o.Subsets = 50,
    seeds: o.Seeds = 1,
    removals: o.Removals = 50,
    baselines: o.Baselines = None,
    methods: o.Methods = None,
    curvature: o.Curvature = o.CurvatureName.FISHER,
    samples: o.Samples = None,
    solver: o.Solver = o.SolverName.AUTO,
    sketch: o.Sketch = None,
    sketch_size: o.SketchSize = None,
    rank: o.Rank = None,
    rtol: o.Rtol = None,
    maxiter: o.Maxiter = None,
    preconditioner: o.Preconditioner = None,
    depth: o.Depth = None,
    scale: o.Scale = None,
    repeats: o.Repeats = None,
    step_rows: o.StepRows = None,
    tolerance: o.Tolerance = None,
    sharing: o.Sharing = None,
    damping: o.Damping = "auto",
    tune_damping: o.TuneDamping = False,
    device: o.Device = None,
    dtype: o.Dtype = None,
    batch_size: o.BatchSize = None,
    memory: o.Memory = None,
    store: e.Store = None,
    offload: e.Offload = e.OffloadName.NONE,
    store_dtype: e.StoreDtype = None,
    shard_rows: e.ShardRows = None,
    scheduler: e.Scheduler = None,
    seed: o.Seed = 0,
    out: o.Out,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Test attributions against reality: retrained models, removed rows, wrong labels; run again, it resumes."""
    from refluence.cli import evaluation, rows
    from refluence.cli.method import Method
    from refluence.cli.methods import parse_methods
    from refluence.cli.output_folder import OutputFolder
    from refluence.cli.problem import Source
    from refluence.cli.summary import print_evaluation, print_files
    from refluence.cli.trial import Effort

    folder = OutputFolder(out)
    folder.check()
    source = Source(dataset, model, task, seed, label_noise, l2, n_train, n_test, retrain, epochs)
    method = Method(
        curvature, samples, _solver(ctx), damping, device, dtype, batch_size, _execution(ctx), seed, not quiet
    )
    effort = Effort(subsets, seeds, removals, seed, not quiet)
    if methods is not None and _by_hand(ctx, "curvature"):
        raise typer.BadParameter("is decided by --methods: leave it out", param_hint="--curvature")
    source.check()
    asked = evaluation.Asked(parse_methods(methods, method), metrics, baselines, tune_damping, effort)
    asked.check()
    problem = source.load(progress=not quiet)
    chosen = rows.parse_rows(
        test_rows, rows.count_rows(problem.test), lambda: rows.misclassified(problem.task, problem.test)
    )
    folder.begin("evaluate")
    with folder.marked():
        done = evaluation.run(problem, chosen, asked, folder, given(ctx))
    if not quiet:
        console = Console()
        print_evaluation(console, done)
        print_files(console, folder)


app.command("leverage", cls=Command, epilog=leverage_command.EXAMPLES)(leverage_command.leverage)


@app.command(
    cls=Command,
    epilog=examples(
        ("refluence demo", "into the folder demo"),
        ("refluence demo --out elsewhere --seed 1", "other flipped labels, another network"),
    ),
)
def demo(
    ctx: typer.Context,
    out: o.Out = Path("demo"),
    seed: o.Seed = 0,
    top: o.Top = 8,
    retrain: o.Retrain = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Train a small network on digits with 5 % wrong labels, explain twelve predictions, find the wrong labels."""
    from refluence.cli.demo import run

    run(out, seed=seed, top=top, retrain=retrain, quiet=quiet, options=given(ctx))


@app.command(cls=Command, epilog=examples(("refluence doctor", "before reporting a problem: what runs here")))
def doctor(debug: o.Debug = False) -> None:
    """Print versions, devices, memory, caches and the data found."""
    from refluence.cli.doctor import print_report

    print_report(Console())


def given(ctx: typer.Context) -> dict[str, Any]:
    """The options of a command as they go into the manifest."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in ctx.params.items()}


def _solver(ctx: typer.Context) -> SolverChoice:
    """The solver and its settings, which have the same names as the parameters of the command."""
    from refluence.cli.solver import SolverChoice

    return SolverChoice(**{field.name: ctx.params[field.name] for field in fields(SolverChoice)})


def _execution(ctx: typer.Context) -> e.ExecutionChoice:
    """What the run may use, of which a command may have some options only."""
    names = [field.name for field in fields(e.ExecutionChoice)]
    return e.ExecutionChoice(**{name: ctx.params[name] for name in names if name in ctx.params})


def _by_hand(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _refuse_beside_a_fit(ctx: typer.Context) -> None:
    """An error for an option that a saved fit has decided; the damping may be another."""
    from refluence.cli.solver import TAKEN_BY, flag

    decided = ("curvature", "samples", "solver", *TAKEN_BY, "accuracy", "device", "dtype", "batch_size")
    for name in (*decided, *(field.name for field in fields(e.ExecutionChoice)), "save_fit"):
        if _by_hand(ctx, name):
            raise typer.BadParameter("is decided by the fit of --fit: leave it out", param_hint=flag(name))
