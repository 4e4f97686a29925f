"""`refluence leverage`: files and data sets in, a folder out, usage errors in one line."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

import refluence as rf
from support.cli import run
from support.leverage import deficient, plain


@pytest.fixture
def table(tmp_path):
    frame = pd.DataFrame(deficient(60).numpy(), columns=[f"f{j}" for j in range(12)])
    frame.to_csv(tmp_path / "table.csv", index=False)
    return tmp_path / "table.csv"


def test_a_file(table, tmp_path):
    out = tmp_path / "out"
    result = run("leverage", "--input", table, "--out", out, "--top", 3)
    scores = rf.LeverageScores.load(out / "leverage.parquet")
    torch.testing.assert_close(scores.values, plain(deficient(60)), rtol=0, atol=1e-10)
    for row in scores.top(3).tolist():
        assert f" {row} " in result.output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rank"] == 8
    assert summary["largest"] == float(scores.values.max())
    assert summary["singular_value_kept"] > 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["files"] == ["leverage.parquet", "summary.json", "report.html"]
    assert "table.csv" in (out / "report.html").read_text()


def test_columns_ridge_and_intercept(table, tmp_path):
    run(
        "leverage",
        "--input",
        table,
        "--columns",
        "f1, f3",
        "--ridge",
        0.5,
        "--intercept",
        "--out",
        tmp_path / "o",
        "-q",
    )
    scores = rf.LeverageScores.load(tmp_path / "o" / "leverage.parquet")
    expected = rf.leverage_scores(deficient(60)[:, [1, 3]], 0.5, intercept=True)
    torch.testing.assert_close(scores.values, expected.values, rtol=1e-9, atol=1e-12)


def test_a_data_set_with_its_pictures(tmp_path):
    out = tmp_path / "out"
    result = run("leverage", "--dataset", "digits", "--part", "all", "--effective-dimension", 20, "--out", out)
    scores = rf.LeverageScores.load(out / "leverage.parquet")
    assert scores.values.numel() == 1797
    assert scores.effective_dimension == pytest.approx(20)
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64") == 3
    assert "http" not in page.replace("http-equiv", "")
    assert "label" in result.output


def test_a_layer_of_a_trained_model(tmp_path):
    out = tmp_path / "out"
    options = ("--model", "mlp", "--layer", "1", "--n-train", 200, "--n-test", 20, "--no-report")
    run("leverage", "--dataset", "digits", *options, "--ratio", 0.1, "--out", out)
    assert rf.LeverageScores.load(out / "leverage.parquet").values.numel() == 200
    assert not (out / "report.html").exists()
    wrong = run("leverage", "--dataset", "digits", "--model", "mlp", "--layer", "nine", "--out", out, code=1)
    assert "no layer 'nine': close to it are" in wrong.output


@pytest.mark.parametrize("method", ["exact", "gram", "sketch", "recursive"])
def test_methods(method, tmp_path):
    np.save(tmp_path / "X.npy", deficient(2000).numpy())
    out = tmp_path / "out"
    run(
        "leverage",
        "--input",
        tmp_path / "X.npy",
        "--ridge",
        1e-2,
        "--method",
        method,
        "--out",
        out,
        "-q",
        "--no-report",
    )
    assert json.loads((out / "summary.json").read_text())["method"] == method


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either a file or a data set"),
        (("--dataset", "nothing"), "unknown data set 'nothing'"),
        (("--dataset", "digits", "--model", "mlp"), "a model and a layer of it go together"),
        (("--dataset", "digits", "--columns", "a"), "is for --input with a table"),
        (("--dataset", "digits", "--ridge", "1", "--ratio", "1"), "each decides λ"),
        (("--input", "X.npy", "--layer", "1"), "is for built-in data sets"),
    ],
)
def test_options_that_do_not_go_together(arguments, message, tmp_path):
    assert message in run("leverage", *arguments, "--out", tmp_path / "out", code=2).output
    assert not (tmp_path / "out").exists()


def test_other_peoples_folders_are_left_alone(table, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    wrong = run("leverage", "--input", table, "--out", tmp_path / "mine", code=1)
    assert "is not empty and was not made by refluence" in wrong.output
