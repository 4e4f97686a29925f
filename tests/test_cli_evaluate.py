"""`refluence evaluate` and `attribute --verify`, end to end on few digits."""

import json
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import refluence as rf
from refluence.cli import trial
from refluence.cli.method import Method
from refluence.cli.methods import parse_methods
from refluence.cli.options import CurvatureName, SolverName
from refluence.cli.solver import SolverChoice
from refluence.evaluation.ground_truth import GroundTruth
from refluence.evaluation.lds import lds
from refluence.evaluation.verification import verify
from refluence.zoo import load_benchmark
from support.cli import run

SMALL = ["--dataset", "digits", "--model", "lr", "--n-train", 100, "--n-test", 20, "--epochs", 2]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache for all tests here, so that a model is trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFLUENCE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Folder and output of one run with every metric, λ tuned."""
    out = tmp_path_factory.mktemp("run") / "results"
    options = ["--l2", "1e-2", "--label-noise", "0.1", "--subsets", 5, "--removals", 6, "--metrics", "all"]
    methods = ["--methods", "ggn:dense,fisher:gram:0.1", "--tune-damping", "--baselines", "random,loss"]
    return out, run("evaluate", *SMALL, *options, *methods, "--out", out).stdout


def test_evaluate_writes_what_it_promises(evaluated):
    out, printed = evaluated
    assert {path.name for path in out.iterdir()} == {
        "summary.json",
        "results.parquet",
        "manifest.json",
        "report.html",
        "figures",
        "ground-truth",
    }
    assert {path.stem for path in (out / "figures").iterdir()} == {"lds", "loo", "mislabel", "removal", "brittleness"}
    table = pd.read_parquet(out / "results.parquet")
    assert list(table) == ["method", "kind", "metric", "value", "low", "high", "confidence"]
    assert set(table["method"]) == {"ggn:dense", "fisher:gram:0.1", "random", "loss"}
    expected = {"lds", "loo_slope", "loo_spearman", "auroc", "tail_patch", "class_retrieval", "randomisation"}
    assert expected <= set(table["metric"])
    assert any(metric.startswith("removal_helpful_") for metric in table["metric"])
    assert any(metric.startswith("brittleness_") for metric in table["metric"])
    assert "order the models best: LDS" in " ".join(printed.split())


def test_the_summary_is_flat_and_has_every_number(evaluated):
    out, _ = evaluated
    summary = json.loads((out / "summary.json").read_text())
    assert all(not isinstance(value, dict) for value in summary.values())
    assert summary["methods"] == ["ggn:dense", "fisher:gram:0.1"]
    for row in pd.read_parquet(out / "results.parquet").to_dict("records"):
        value = summary[f"{row['method']}/{row['metric']}"]
        assert value == pytest.approx(row["value"]) if value is not None else np.isnan(row["value"])


def test_a_tuned_damping_is_chosen_on_rows_that_are_not_reported(evaluated):
    manifest = json.loads((evaluated[0] / "manifest.json").read_text())
    summary = json.loads((evaluated[0] / "summary.json").read_text())
    assert summary["reported_test_rows"] == len(manifest["reported_rows"]) == 18
    assert summary["ggn:dense/damping"] == manifest["tuned_damping"]["ggn:dense"]["damping"]
    table = pd.DataFrame(manifest["tuned_damping"]["ggn:dense"]["table"])
    assert summary["ggn:dense/damping"] == pytest.approx(table.loc[table["lds"].idxmax(), "damping"])


def test_the_lds_is_that_of_the_library_on_the_reported_rows(evaluated):
    out, _ = evaluated
    manifest = json.loads((out / "manifest.json").read_text())
    summary = json.loads((out / "summary.json").read_text())
    bench = load_benchmark("digits", "lr", l2=1e-2, label_noise=0.1, n_train=100, n_test=20, epochs=2, progress=False)
    rows = manifest["reported_rows"]
    damping = summary["ggn:dense/damping"]
    influence = rf.Influence(bench.task, "ggn", rf.solvers.Dense(), damping, progress=False).fit(bench.train)
    truth = GroundTruth.load(out / "ground-truth" / "halves-5x1-seed-0" / "ground_truth.safetensors").tests(rows)
    expected = lds(influence.score(tuple(part[rows] for part in bench.test)), truth)
    assert summary["ggn:dense/lds"] == pytest.approx(expected.value)
    assert summary["ggn:dense/lds/low"] == pytest.approx(expected.low)


def test_run_again_nothing_is_trained_twice(evaluated, tmp_path, monkeypatch):
    from refluence.evaluation import retraining

    out = tmp_path / "results"
    some = ["evaluate", *SMALL, "--subsets", 4, "--metrics", "lds", "--baselines", "none", "--out", out, "--quiet"]
    assert run(*some, "--curvature", "ggn").output == ""
    first = json.loads((out / "summary.json").read_text())

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(retraining, "Trainer", refuse)
    run(*some, "--curvature", "ggn")
    assert json.loads((out / "summary.json").read_text()) == first
    run(*some, "--curvature", "fisher")  # another method shares the ground truth
    assert "fisher:auto/lds" in json.loads((out / "summary.json").read_text())


def test_what_does_not_apply_is_left_out_with_the_reason(tmp_path):
    out = tmp_path / "results"
    printed = run("evaluate", *SMALL, "--subsets", 3, "--baselines", "random", "--out", out).stdout
    summary = json.loads((out / "summary.json").read_text())
    assert summary["skipped"] == ["brittleness", "loo", "mislabel", "removal"]
    words = " ".join(printed.split())
    assert "not tested: mislabel: no train label is known to be wrong: give --label-noise 0.1" in words
    assert "without l2 the training objective need not have a minimum" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        (["--metrics", "mislabel"], 1, "--metrics mislabel does not apply to digits lr: no train label is known"),
        (["--metrics", "loo"], 1, "without l2 the training objective"),
        (["--metrics", "speed"], 2, "'speed' is not known: use all, or some of lds, loo"),
        (["--baselines", "luck"], 2, "'luck' is not known: use all, or some of random, loss"),
        (["--subsets", "2"], 2, "needs 3 at the least"),
        (["--methods", "ggn"], 2, "'ggn' is not of the form CURVATURE:SOLVER"),
        (["--methods", "ggn:cg,ggn:cg"], 2, "is named twice"),
        (["--methods", "ggn:cg", "--solver", "gram"], 2, "--solver: is decided by --methods"),
        (["--methods", "ggn:cg", "--curvature", "fisher"], 2, "--curvature: is decided by --methods"),
        (["--methods", "ggn:gram", "--rtol", "1e-3"], 2, "--rtol: is taken by none of ggn:gram"),
        (["--methods", "ggn:gram:much"], 2, "relative:0.1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_a_clear_error(tmp_path, options, code, expected):
    result = run("evaluate", *SMALL, "--out", tmp_path / "results", *options, code=code)
    assert expected in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert code == 1 or not (tmp_path / "results").exists()


def test_settings_go_to_the_methods_whose_solver_has_them():
    base = Method(solver=SolverChoice(rtol=1e-3, rank=9), damping="0.1")
    methods = parse_methods("ggn:cg,hessian:arnoldi:relative:0.5,mc_fisher:ekfac", base)
    assert methods["ggn:cg"].solver == SolverChoice(SolverName.CG, rtol=1e-3)
    arnoldi = methods["hessian:arnoldi:relative:0.5"]
    assert arnoldi.solver == SolverChoice(SolverName.ARNOLDI, rank=9)
    assert (arnoldi.curvature, arnoldi.damping) == (CurvatureName.HESSIAN, "relative:0.5")
    assert methods["mc_fisher:ekfac"].damping == "0.1"


MODULE = """
    import torch
    from torch import nn
    import refluence as rf
    from refluence.training import Recipe

    def parts():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(60, 4, generator=generator)
        y = (x[:, 0] + 0.3 * torch.randn(60, generator=generator) > 0).long()
        torch.manual_seed(0)
        return rf.Task(nn.Linear(4, 2)), (x[:48], y[:48]), (x[48:], y[48:])

    def with_recipe():
        return *parts(), Recipe(learning_rate=0.1, epochs=2, batch_size=16)
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    path = tmp_path / "users_model.py"
    path.write_text(textwrap.dedent(MODULE))
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    return path


def test_a_users_task_brings_its_recipe(users, tmp_path):
    out = tmp_path / "results"
    run("evaluate", "--task", f"{users}:with_recipe", "--out", out, "--subsets", 4, "--quiet")
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["train_rows"], summary["test_rows"]) == (48, 12)
    assert -1 <= summary["fisher:auto/lds"] <= 1
    run("attribute", "--task", f"{users}:with_recipe", "--out", tmp_path / "scored", "--quiet", "--no-report")


@pytest.mark.parametrize("options", [["--metrics", "lds"], ["--tune-damping"]])
def test_without_a_recipe_the_error_says_how_to_give_one(users, tmp_path, options):
    result = run("evaluate", "--task", f"{users}:parts", "--out", tmp_path / "results", *options, code=1)
    assert trial.NO_RECIPE in " ".join(result.stderr.split())


def test_attribute_verifies(tmp_path):
    out = tmp_path / "results"
    options = ["--l2", "1e-2", "--curvature", "ggn", "--damping", "0", "--test-rows", "0:4"]
    result = run("attribute", *SMALL, *options, "--out", out, "--verify", 4)
    bench = load_benchmark("digits", "lr", l2=1e-2, n_train=100, n_test=20, epochs=2, progress=False)
    influence = rf.Influence(bench.task, "ggn", damping=0.0, progress=False).fit(bench.train)
    test = tuple(part[:4] for part in bench.test)
    expected = verify(influence, influence.score(test), test, 4, progress=False)
    assert expected.sentence in " ".join(result.stdout.split())
    found = json.loads((out / "manifest.json").read_text())["verification"]
    assert (found["verdict"], found["slope"]) == (expected.verdict, pytest.approx(expected.slope))
    checks = pd.DataFrame(found["checks"])
    assert checks["measured"].tolist() == pytest.approx(expected.frame["measured"].tolist())
    page = (out / "report.html").read_text()
    assert "Checked against reality" in page
    assert page.count("<circle") == 16


def test_attribute_says_that_nothing_was_verified(tmp_path):
    out = tmp_path / "results"
    result = run("attribute", *SMALL, "--out", out, "--test-rows", "0:2")
    assert "not verified; --verify 8" in result.stdout
    assert json.loads((out / "manifest.json").read_text())["verification"] is None
    assert "Not verified" in (out / "report.html").read_text()


def test_one_removal_is_too_few(tmp_path):
    result = run("attribute", *SMALL, "--out", tmp_path / "results", "--verify", 1, code=2)
    assert "removes two rows at the least" in " ".join(result.stderr.replace("│", " ").split())


def test_another_command_leaves_the_ground_truth(evaluated, tmp_path):
    out = tmp_path / "results"
    run("evaluate", *SMALL, "--subsets", 3, "--metrics", "lds", "--baselines", "none", "--out", out, "--quiet")
    kept = [path.name for path in Path(out / "ground-truth").rglob("*.safetensors")]
    run("attribute", *SMALL, "--out", out, "--test-rows", "0", "--quiet")
    names = {path.name for path in out.iterdir()}
    assert names == {"scores.zarr", "top.parquet", "manifest.json", "report.html", "ground-truth"}
    assert [path.name for path in Path(out / "ground-truth").rglob("*.safetensors")] == kept
    assert torch.isfinite(rf.Scores.load(out / "scores.zarr").values).all()
