"""The command line end to end, on the digits."""

import dataclasses
import json
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import refluence as rf
from refluence.cli.method import parse_damping
from refluence.cli.rows import parse_rows, select_rows
from refluence.solvers import preconditioners
from refluence.zoo import load_benchmark
from support.cli import run

RESULTS = {"scores.zarr", "top.parquet", "manifest.json", "report.html"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache for all tests here, so that a model is trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFLUENCE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("REFLUENCE_DATA", raising=False)
        yield


@pytest.fixture(scope="module")
def attributed(tmp_path_factory):
    """The folder and the output of one run."""
    out = tmp_path_factory.mktemp("run") / "results"
    rows = ["--test-rows", "3,0:2,359", "--top", 5]
    return out, run("attribute", "--dataset", "digits", "--model", "mlp", "--out", out, "--seed", 0, *rows).stdout


def test_attribute_writes_what_it_promises(attributed):
    out, _ = attributed
    assert {path.name for path in out.iterdir()} == RESULTS
    scores = rf.Scores.load(out / "scores.zarr")
    assert scores.values.shape == (4, 1437)
    assert scores.test_ids.tolist() == [3, 0, 1, 359]
    top = pd.read_parquet(out / "top.parquet")
    assert len(top) == 4 * 5 * 2
    assert set(top["direction"]) == {"helpful", "harmful"}
    assert list(dict.fromkeys(top["test"])) == [3, 0, 1, 359]
    first = top[(top["test"] == 359) & (top["direction"] == "helpful") & (top["rank"] == 1)].iloc[0]
    assert first["train"] == scores.values[3].argmax().item()
    assert first["score"] == pytest.approx(scores.values[3].max().item())
    assert (out / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_attribute_gives_the_scores_of_the_library(attributed):
    benchmark = load_benchmark("digits", "mlp", progress=False)
    influence = rf.Influence(benchmark.task, progress=False).fit(benchmark.train)
    expected = influence.score(tuple(part[[3, 0, 1, 359]] for part in benchmark.test)).values
    torch.testing.assert_close(rf.Scores.load(attributed[0] / "scores.zarr").values, expected)


def test_the_manifest_says_what_made_the_results(attributed):
    manifest = json.loads((attributed[0] / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["command"] == "attribute"
    assert manifest["options"]["test_rows"] == "3,0:2,359"
    assert manifest["options"]["seed"] == 0
    assert manifest["test_rows"] == [3, 0, 1, 359]
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["problem"]["accuracy"] >= 0.96
    assert manifest["problem"]["recipe"]["epochs"] == 30
    assert {"fit", "score", "save", "report"} <= set(manifest["timings_seconds"])
    assert set(manifest["files"]) == RESULTS - {"manifest.json"}
    assert manifest["influence"]


def test_attribute_prints_a_summary_and_the_files(attributed):
    out, printed = attributed
    for expected in ("4 test rows by 1,437 train rows", "test accuracy", "damping", "effective dimension", "359"):
        assert expected in printed
    assert str(out / "report.html") in printed.replace("\n", "")


def test_attribute_again_on_its_own_folder_leaves_nothing_old(attributed, tmp_path):
    out = tmp_path / "results"
    run("attribute", "--dataset", "digits", "--out", out, "--test-rows", "0", "--top", 1, "--quiet")
    quiet = run("attribute", "--dataset", "digits", "--out", out, "--test-rows", "1", "--no-report", "--quiet")
    assert quiet.output == ""
    assert {path.name for path in out.iterdir()} == RESULTS - {"report.html"}
    assert rf.Scores.load(out / "scores.zarr").test_ids.tolist() == [1]


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    result = run("attribute", "--dataset", "digits", "--out", tmp_path, code=1)
    assert "was not made by refluence" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "manifest.json").write_text('{"tool": "another"}')
    run("attribute", "--dataset", "digits", "--out", tmp_path, code=1)


def test_a_run_that_was_cut_off_can_be_repeated(tmp_path):
    out = tmp_path / "results"
    out.mkdir()
    (out / "manifest.json").write_text('{"tool": "refluence", "status": "running"}')
    (out / "top.parquet").write_bytes(b"half")
    run("attribute", "--dataset", "digits", "--out", out, "--test-rows", "0", "--no-report", "--quiet")
    assert json.loads((out / "manifest.json").read_text())["status"] == "complete"


def test_the_misclassified_rows(tmp_path):
    out = tmp_path / "results"
    run("attribute", "--dataset", "digits", "--out", out, "--test-rows", "errors", "--no-report", "--quiet")
    benchmark = load_benchmark("digits", "mlp", progress=False)
    inputs, labels = benchmark.test
    wrong = (benchmark.task.model(inputs).argmax(1) != labels).nonzero().flatten().tolist()
    assert 0 < len(wrong) < 20
    assert rf.Scores.load(out / "scores.zarr").test_ids.tolist() == wrong


@pytest.mark.parametrize(
    "options",
    [
        ["--solver", "gram"],
        ["--solver", "dense", "--damping", "1e-2", "--model", "lr"],
        ["--solver", "identity"],
        ["--sketch", "gaussian", "--sketch-size", 256, "--damping", "relative:0.5"],
        ["--solver", "sketched", "--sketch", "rademacher", "--sketch-size", 256, "--damping", "dim:20"],
        ["--sketch-size", 512],
        ["--sketch", "kronecker", "--sketch-size", 256, "--repeats", 2, "--damping", "dim:20"],
        ["--dtype", "float64", "--batch-size", 100, "--device", "cpu", "--memory", "2GB"],
        ["--curvature", "mc_fisher", "--samples", 3, "--n-train", 200],
    ],
    ids=lambda options: " ".join(str(option) for option in options),
)
def test_every_option_runs(tmp_path, options):
    out = tmp_path / "results"
    run("attribute", "--dataset", "digits", "--out", out, "--test-rows", "0:2", "--no-report", *options)
    values = rf.Scores.load(out / "scores.zarr").values
    assert values.shape == (2, 200 if "--n-train" in options else 1437)
    assert torch.isfinite(values).all()
    assert values.abs().max() > 0


def test_as_accurate_as_asked_and_certified(tmp_path):
    out = tmp_path / "results"
    options = ["--sketch", "sjlt", "--sketch-size", 128, "--accuracy", "0.5", "--certify", "--test-rows", "3:7"]
    result = run("attribute", "--dataset", "digits", "--out", out, *options)
    frame = pd.read_parquet(out / "certificate.parquet")
    assert frame["test"].tolist() == [3, 4, 5, 6]
    assert frame["checked"].all()
    manifest = json.loads((out / "manifest.json").read_text())
    certificate = manifest["certificate"]
    assert certificate["reference"] == "Gram"
    assert certificate["largest_error"] == pytest.approx(frame["error"].max())
    assert int(manifest["influence"]["solver"].split("m=")[1].split(",")[0]) > 128
    assert "certificate.parquet" in manifest["files"]
    assert "Certificate." in (out / "report.html").read_text()
    assert "it certifies how well the solver" in " ".join(result.output.lower().split())
    run("attribute", "--dataset", "digits", "--out", out, "--test-rows", "3", "--no-report", "--quiet")
    assert not (out / "certificate.parquet").exists()


CHOICES = [
    (["gram"], rf.solvers.Gram()),
    (["dense"], rf.solvers.Dense()),
    (["identity"], rf.solvers.Identity()),
    (["cg", "--rtol", "1e-3", "--maxiter", 70], rf.solvers.ConjugateGradient(rtol=1e-3, maxiter=70)),
    (
        ["cg", "--preconditioner", "nystroem", "--rank", 9],
        rf.solvers.ConjugateGradient(preconditioner=preconditioners.Nystroem(9, seed=4)),
    ),
    (["cg", "--preconditioner", "jacobi"], rf.solvers.ConjugateGradient(preconditioner=preconditioners.Jacobi())),
    (["cg", "--preconditioner", "ekfac"], rf.solvers.ConjugateGradient(preconditioner=rf.solvers.Ekfac())),
    (["cg", "--preconditioner", "kfac"], rf.solvers.ConjugateGradient(preconditioner=rf.solvers.Kfac())),
    (["lissa", "--depth", 40, "--scale", 50], rf.solvers.Lissa(depth=40, scale=50.0, seed=4)),
    (
        ["lissa", "--repeats", 2, "--step-rows", 60, "--tolerance", "0.5"],
        rf.solvers.Lissa(repeats=2, batch_size=60, tolerance=0.5, seed=4),
    ),
    (["arnoldi", "--rank", 8, "--tolerance", "1e-2"], rf.solvers.Arnoldi(8, tolerance=1e-2, seed=4)),
    (["nystroem", "--rank", 8], rf.solvers.Nystroem(8, seed=4)),
    (["harmonic-mean"], rf.solvers.HarmonicMean()),
    (["kfac", "--sharing", "reduce"], rf.solvers.Kfac(sharing="reduce")),
    (["ekfac"], rf.solvers.Ekfac()),
    (["kfac", "--sketch-size", 64], rf.solvers.Kfac(sketch=rf.sketches.Kronecker(8, 8, seed=4))),
    (["ekfac", "--sketch", "kronecker"], rf.solvers.Ekfac(sketch=rf.sketches.Kronecker(64, 64, seed=4))),
    (["sketched", "--sketch", "gaussian", "--sketch-size", 64], rf.solvers.Sketched(rf.sketches.Gaussian(64, seed=4))),
    (
        ["sketched", "--sketch", "tensor", "--sketch-size", 64, "--repeats", 3],
        rf.solvers.Sketched(rf.sketches.TensorSketch(64, seed=4), replicates=3),
    ),
    (["sketched", "--sketch", "kronecker"], rf.solvers.Sketched(rf.sketches.Kronecker(64, 64, seed=4))),
    (["auto"], "auto"),
]


@pytest.mark.parametrize(
    ("options", "solver"), CHOICES, ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else ""
)
def test_every_solver_has_a_name_and_its_main_settings(monkeypatch, options, solver):
    from refluence.cli.method import Method

    asked = []
    monkeypatch.setattr(Method, "influence", lambda self, task: asked.append(self) or rf.Influence(task))
    run("plan", "--dataset", "digits", "--model", "lr", "--seed", 4, "--solver", *options)
    assert asked[0].solver.build(asked[0].seed) == solver


def test_every_solver_of_the_library_has_a_name():
    from refluence.cli.options import SolverName

    named = {type(solver) for _, solver in CHOICES} - {str}
    library = (getattr(rf.solvers, name) for name in rf.solvers.__all__)
    assert named == {kind for kind in library if isinstance(kind, type) and dataclasses.is_dataclass(kind)} - {
        rf.solvers.Solution
    }
    assert {options[0] for options, _ in CHOICES} == set(SolverName)


@pytest.mark.parametrize("curvature", ["fisher", "ggn", "hessian", "true_fisher", "mc_fisher"])
def test_every_curvature_runs_and_is_in_the_summary(tmp_path, curvature):
    out, some = tmp_path / "results", ["--model", "lr", "--n-train", 80, "--test-rows", "0:2", "--damping", "0.1"]
    result = run("attribute", "--dataset", "digits", "--out", out, "--curvature", curvature, "--solver", "cg", *some)
    assert any(line.split() == ["curvature", curvature] for line in result.stdout.splitlines())
    residual = next(line for line in result.stdout.splitlines() if line.startswith("relative residual"))
    assert "after" in residual
    assert " step" in residual
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["influence"]["curvature"] == curvature
    assert max(manifest["diagnostics"]["residual"]) <= 1e-6
    words = {"ggn": "generalised Gauss–Newton", "hessian": "Hessian", "mc_fisher": "sampled Fisher"}
    assert words.get(curvature, "Fisher") in (out / "report.html").read_text()


def test_the_summary_names_layers_without_a_kronecker_form(module):
    printed = run(
        "attribute",
        "--task",
        f"{module}:normed",
        "--out",
        "r",
        "--test-rows",
        "0:2",
        "--solver",
        "ekfac",
        "--curvature",
        "ggn",
        "--damping",
        "0.1",
        "--no-report",
    ).stdout
    assert "without a kronecker form" in printed
    assert "1.weight, 1.bias taken whole" in printed


def test_negative_eigenvalues_are_in_the_summary_and_the_report(module):
    options = ["--curvature", "hessian", "--solver", "dense", "--damping", "1e-4"]
    result = run("attribute", "--task", f"{module}:normed", "--out", "r", "--test-rows", "0:2", *options)
    assert "negative eigenvalues" in result.stdout
    assert "stay negative with the damping" in Path("r/report.html").read_text()
    assert "at no minimum" in result.stderr


def test_a_fit_is_kept_and_used_again(tmp_path):
    some = ["attribute", "--dataset", "digits", "--model", "lr", "--n-train", 90, "--quiet", "--no-report"]
    how = ["--curvature", "ggn", "--solver", "gram"]
    kept = tmp_path / "kept"
    run(*some, *how, "--damping", "0.1", "--test-rows", "2,3", "--save-fit", kept, "--out", tmp_path / "a")
    run(*some, "--fit", kept, "--test-rows", "2,3", "--out", tmp_path / "b")
    run(*some, "--fit", kept, "--test-rows", "2,3", "--damping", "0.2", "--out", tmp_path / "c")
    run(*some, *how, "--damping", "0.2", "--test-rows", "2,3", "--out", tmp_path / "d")
    first, again, other, fresh = (rf.Scores.load(tmp_path / name / "scores.zarr") for name in "abcd")
    torch.testing.assert_close(again.values, first.values, rtol=1e-10, atol=1e-12)
    assert again.test_ids.tolist() == [2, 3]
    assert other.target_damping == 0.2
    torch.testing.assert_close(other.values, fresh.values, rtol=1e-10, atol=1e-12)
    assert "load" in json.loads((tmp_path / "b" / "manifest.json").read_text())["timings_seconds"]


def test_a_fit_on_other_rows_is_refused(tmp_path):
    some = ["attribute", "--dataset", "digits", "--model", "lr", "--quiet", "--no-report", "--test-rows", "0"]
    kept = tmp_path / "kept"
    run(*some, "--n-train", 90, "--save-fit", kept, "--out", tmp_path / "a")
    result = run(*some, "--n-train", 91, "--fit", kept, "--out", tmp_path / "b", code=1)
    assert "Error:" in result.stderr  # another network too, which is seen first
    (tmp_path / "thesis.tex").write_text("mine")
    result = run(*some, "--n-train", 90, "--save-fit", tmp_path, "--out", tmp_path / "c", code=1)
    assert "holds no fit: choose another path" in result.stderr
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--dataset", "imagenet"], "digits, mnist"),
        (["--dataset", "digits", "--model", "vit"], "mlp, lr, cnn"),
        (["--dataset", "digits", "--solver", "magic"], "gram"),
        (["--dataset", "digits", "--damping", "much"], "relative:0.1"),
        (["--dataset", "digits", "--damping", "relative:-1"], "RelativeDamping needs a ratio"),
        (["--dataset", "digits", "--test-rows", "400"], "0 to 359"),
        (["--dataset", "digits", "--test-rows", "first"], "not understood"),
        (["--dataset", "digits", "--test-rows", "5:5"], "selects none"),
        (["--dataset", "digits", "--device", "abacus"], "abacus"),
        (["--dataset", "digits", "--solver", "gram", "--sketch-size", "5"], "for the sketched or kfac or ekfac solver"),
        (["--dataset", "digits", "--solver", "cg", "--rank", "5"], "--rank: of the cg solver goes with --precond"),
        (["--dataset", "digits", "--solver", "cg", "--preconditioner", "nystroem"], "--rank: of the cg solver"),
        (["--dataset", "digits", "--solver", "nystroem"], "--rank: is needed by the nystroem solver"),
        (["--dataset", "digits", "--solver", "kfac", "--rtol", "1e-3"], "--rtol: is for the cg solver, not for kfac"),
        (["--dataset", "digits", "--rank", "3"], "--rank: is for the arnoldi or nystroem or cg solver, not for auto"),
        (["--dataset", "digits", "--solver", "lissa", "--scale", "-1"], "--scale: the scale of Lissa must be > 0"),
        (["--dataset", "digits", "--solver", "cg", "--rtol", "2"], "--rtol: ConjugateGradient(rtol=2.0"),
        (["--dataset", "digits", "--sketch", "kronecker", "--sketch-size", "60"], "a square, such as 49 or 64, not 60"),
        (["--dataset", "digits", "--solver", "kfac", "--sketch", "sjlt"], "sketch must be a rf.sketches.Kronecker"),
        (["--dataset", "digits", "--samples", "3"], "--samples: is for --curvature mc_fisher, not for fisher"),
        (["--dataset", "digits", "--accuracy", "2"], "--accuracy: epsilon of Accuracy must lie between 0 and 1"),
        (["--dataset", "digits", "--fit", "kept", "--accuracy", "0.1"], "--accuracy: is decided by the fit of --fit"),
        (["--dataset", "digits", "--curvature", "gauss"], "ggn"),
        (["--dataset", "digits", "--fit", "kept", "--solver", "gram"], "--solver: is decided by the fit of --fit"),
        (["--dataset", "digits", "--fit", "kept", "--save-fit", "x"], "--save-fit: is decided by the fit of --fit"),
        (["--dataset", "digits", "--task", "a:b"], "either --dataset"),
        ([], "either --dataset"),
        (["--task", "a:b", "--label-noise", "0.1"], "built-in"),
        (["--task", "nothing"], "module:function"),
        (["--task", "no_such_module_at_all:task"], "no module"),
        (["--task", "no_such_file.py:task"], "no file"),
        (["--task", "json:nothing_here"], "has no function"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else None,
)
def test_what_cannot_be_understood_is_a_usage_error(tmp_path, options, expected):
    result = run("attribute", "--out", tmp_path / "results", *options, code=2)
    assert expected in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "results").exists()


def test_a_library_error_is_one_line_and_debug_shows_where(tmp_path):
    arguments = ["attribute", "--dataset", "mnist", "--out", tmp_path / "results"]
    result = run(*arguments, code=1)
    assert result.stderr.startswith("Error: MNIST was not found")
    assert "refluence data fetch mnist" in result.stderr
    assert "Traceback" not in result.output
    assert "Traceback" in run(*arguments, "--debug", code=1).stderr
    assert "Traceback" in run("--debug", *arguments, code=1).stderr


MODULE = """
    import torch
    from torch import nn
    import refluence as rf
    from refluence.report import Presentation
    from refluence.zoo import load_benchmark

    def parts():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(60, 4, generator=generator)
        y = (x[:, 0] > 0).long()
        torch.manual_seed(0)
        return rf.Task(nn.Linear(4, 2)), (x[:50], y[:50]), (x[50:], y[50:])

    def shown():
        return (*parts(), Presentation(kind="table", feature_names=["alpha", "beta", "gamma", "delta"]))

    def datasets():
        task, train, test = parts()
        as_dataset = torch.utils.data.TensorDataset
        return task, torch.utils.data.DataLoader(as_dataset(*train), batch_size=7), Rows(*test)

    class Rows(torch.utils.data.Dataset):
        def __init__(self, *parts): self.parts = parts
        def __len__(self): return len(self.parts[0])
        def __getitem__(self, row): return tuple(part[row] for part in self.parts)

    def benchmark():
        return load_benchmark("digits", "mlp", progress=False)

    def normed():
        task, train, test = parts()
        torch.manual_seed(0)
        return rf.Task(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2))), train, test

    def regression():
        x = torch.randn(20, 3)
        return rf.Task(nn.Linear(3, 1), loss="mse"), (x, x[:, 0]), (x, x[:, 0])

    def wrong():
        return 42

    def broken():
        raise KeyError("lost")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the working folder."""
    name = f"users_{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def test_a_users_own_task_by_module(module):
    run("attribute", "--task", f"{module}:parts", "--out", "results", "--test-rows", "0:3", "--top", 2)
    scores = rf.Scores.load("results/scores.zarr")
    assert scores.values.shape == (3, 50)
    task, train, test = sys.modules[module].parts()
    expected = rf.Influence(task, progress=False).fit(train).score(tuple(part[:3] for part in test)).values
    torch.testing.assert_close(scores.values, expected)


def test_a_users_own_task_by_file_with_a_presentation(module, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    out = tmp_path / "results"
    run("attribute", "--task", f"{tmp_path / module}.py:shown", "--out", out, "--test-rows", "9")
    assert "gamma" in (out / "report.html").read_text()


def test_a_users_datasets_and_loaders(module):
    run("attribute", "--task", f"{module}:datasets", "--out", "sets", "--test-rows", "8,1", "--no-report")
    run("attribute", "--task", f"{module}:parts", "--out", "tensors", "--test-rows", "8,1", "--no-report")
    found, expected = (rf.Scores.load(f"{folder}/scores.zarr") for folder in ("sets", "tensors"))
    assert found.test_ids.tolist() == [8, 1]
    torch.testing.assert_close(found.values, expected.values)


def test_a_users_function_may_return_a_benchmark(module):
    run("attribute", "--task", f"{module}:benchmark", "--out", "results", "--test-rows", "0", "--no-report")
    assert json.loads(Path("results/manifest.json").read_text())["problem"]["accuracy"] >= 0.96


@pytest.mark.parametrize(
    ("function", "expected"),
    [("wrong", "returned (int); it must return (task, train, test)"), ("broken", "KeyError: 'lost' (line")],
)
def test_a_users_function_that_does_not_work(module, function, expected):
    result = run("attribute", "--task", f"{module}:{function}", "--out", "results", code=1)
    assert expected in result.stderr
    assert "Traceback" not in result.output


def test_errors_of_a_regression_are_not_defined(module):
    result = run("attribute", "--task", f"{module}:regression", "--out", "r", "--test-rows", "errors", code=2)
    assert "needs a classifier" in result.stderr


def test_a_file_that_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "half.py").write_text("import a_module_that_is_not_there\n")
    result = run("attribute", "--task", f"{tmp_path / 'half.py'}:f", "--out", tmp_path / "results", code=1)
    assert "a_module_that_is_not_there" in result.stderr
    assert "line 1 of" in result.stderr


def test_plan_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("REFLUENCE_CACHE", str(tmp_path / "empty"))
    printed = run("plan", "--dataset", "digits", "--model", "mlp", "--test-rows", "errors").stdout
    assert "gram" in printed.lower()
    assert not (tmp_path / "empty").exists()


def test_a_plan_that_does_not_fit_is_refused():
    result = run("plan", "--dataset", "digits", "--solver", "dense", "--memory", "1MB", code=1)
    assert "does not fit" in result.stdout
    assert result.stderr.startswith("Error: solver Dense needs")
    assert "Traceback" not in result.output


def test_demo_finds_the_wrong_labels(tmp_path):
    out = tmp_path / "demo"
    printed = run("demo", "--out", out).stdout
    assert {path.name for path in out.iterdir()} == RESULTS
    manifest = json.loads((out / "manifest.json").read_text())
    recovery = manifest["label_recovery"]
    assert recovery["flipped"] == recovery["looked_at"] == 72
    assert recovery["by_chance"] == pytest.approx(3.6, abs=0.02)
    assert recovery["found"] >= 50
    assert f"are {recovery['found']} of them" in " ".join(printed.split())
    assert str(out / "report.html") in printed.replace("\n", "")
    rows = manifest["test_rows"]
    assert len(rows) == len(set(rows)) == 12
    benchmark = load_benchmark("digits", "mlp", label_noise=0.05, progress=False)
    inputs, labels = (part[rows] for part in benchmark.test)
    wrong = benchmark.task.model(inputs).argmax(1) != labels
    assert 0 < wrong.sum() <= 6
    assert wrong[: int(wrong.sum())].all()  # the misclassified ones first
    assert len(labels.unique()) >= 8
    assert manifest["problem"]["flipped"] == benchmark.flipped.tolist()


def test_help_has_examples():
    for command in ([], ["attribute"], ["plan"], ["demo"], ["doctor"], ["data"], ["data", "list"], ["data", "fetch"]):
        printed = run(*command, "--help").stdout
        assert "Examples" in printed
        assert f"refluence {' '.join(command)}".strip() in printed


def test_version():
    assert run("--version").stdout == f"refluence {rf.__version__}\n"


def test_help_imports_nothing_heavy_of_the_command_line():
    """Modules of the command line that compute are imported when a command runs."""
    script = "import sys, refluence.cli; print([m for m in sys.modules if m.startswith('refluence.zoo')])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_doctor_and_data():
    printed = run("doctor").stdout
    for expected in ("torch", "memory", "devices", "cache", "digits", "not found"):
        assert expected in printed
    assert "digits" in run("data", "list").stdout
    assert run("data", "path").stdout.strip().endswith("data")
    assert "comes with scikit-learn" in run("data", "fetch", "digits").stdout
    assert "not found" in run("data", "path", "mnist", code=1).stderr
    assert "digits, mnist" in run("data", "fetch", "cifar", code=2).stderr


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("3", [3]),
        ("3,17,5", [3, 17, 5]),
        ("0:4", [0, 1, 2, 3]),
        ("-2:", [18, 19]),
        ("-1", [19]),
        ("0:20:10", [0, 10]),
        ("errors", [7, 9]),
        ("errors, 0:2, 7", [7, 9, 0, 1]),
        ("all", list(range(20))),
    ],
)
def test_test_rows(text, rows):
    assert parse_rows(text, 20, lambda: [7, 9]) == rows


def test_selecting_rows_keeps_the_kind_of_data():
    x = torch.arange(12.0).reshape(6, 2)
    assert torch.equal(select_rows((x, x[:, 0]), [4, 1])[0], x[[4, 1]])
    assert torch.equal(select_rows({"input": x}, [5])["input"], x[[5]])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
    assert torch.equal(torch.cat([batch[0] for batch in select_rows(loader, [3, 0])]), x[[3, 0]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", "auto"),
        ("1e-3", 1e-3),
        ("0", 0.0),
        ("relative:0.1", rf.RelativeDamping(0.1)),
        ("dim:200", rf.EffectiveDimension(200.0)),
    ],
)
def test_damping(text, expected):
    assert parse_damping(text) == expected


def test_scores_of_the_folder_are_those_of_the_top_table(attributed):
    out, _ = attributed
    scores = rf.Scores.load(out / "scores.zarr")
    top = pd.read_parquet(out / "top.parquet")
    position = {row: i for i, row in enumerate(scores.test_ids.tolist())}
    values = scores.values.numpy()[[position[test] for test in top["test"]], top["train"].to_numpy()]
    np.testing.assert_allclose(values, top["score"])


def test_a_sketched_run_writes_its_errors_everywhere(tmp_path):
    out = tmp_path / "results"
    options = ["--solver", "sketched", "--sketch", "sjlt", "--sketch-size", 512, "--test-rows", "0:3", "--top", 4]
    run("attribute", "--dataset", "digits", "--model", "mlp", "--out", out, "--seed", 0, *options)
    scores = rf.Scores.load(out / "scores.zarr")
    assert scores.error is not None
    assert scores.target_damping == scores.manifest["damping"]
    top = pd.read_parquet(out / "top.parquet")
    helpful = top[top["direction"] == "helpful"].drop(columns=["direction", "probability_in_bottom"])
    pd.testing.assert_frame_equal(helpful, scores.top(4), check_index_type=False)
    harmful = top[top["direction"] == "harmful"].reset_index(drop=True)
    assert harmful["probability_in_bottom"].tolist() == scores.bottom(4)["probability_in_bottom"].tolist()
    page = (out / "report.html").read_text()
    assert "the error of the random projection alone" in page
    assert "4 most helpful: " in page
