"""`refluence attribute --skip-bad` on data of which some rows cannot be used."""

import json
import sys
import textwrap
import uuid
from pathlib import Path

import pandas as pd
import pytest
import torch

import refluence as rf
from support.cli import run

MODULE = """
    import torch
    import refluence as rf
    from torch import nn

    class Files(torch.utils.data.Dataset):
        def __init__(self, x, y, missing): self.x, self.y, self.missing = x, y, missing
        def __len__(self): return len(self.y)
        def __getitem__(self, row):
            if row in self.missing: raise FileNotFoundError(f"no file {row}")
            return self.x[row], self.y[row]

    def parts(missing):
        torch.manual_seed(0)
        x, y = torch.randn(40, 4), torch.randint(3, (40,))
        model = nn.Linear(4, 3)
        x[5, 0] = torch.nan
        return rf.Task(model), Files(x, y, missing), (torch.randn(6, 4), torch.randint(3, (6,)))

    def bad(): return parts({0, 39})

    def good():
        task, train, test = parts(set())
        train.x[5] = 0.0
        return task, train, test
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


def test_a_bad_row_ends_the_command_with_its_name(module):
    result = run("attribute", "--task", f"{module}:bad", "--out", "results", code=1)
    assert "Error: train row 0 is bad: reading it raises FileNotFoundError: no file 0" in result.stderr


def test_bad_rows_are_left_out_and_named_in_everything_that_is_written(module):
    options = ["--solver", "gram", "--damping", "0.1", "--test-rows", "0:4"]
    result = run("attribute", "--task", f"{module}:bad", "--out", "results", "--skip-bad", *options)
    said = "Note: 3 of 40 training examples are left out: row 0 (reading it raises FileNotFoundError: no file 0), row 5"
    assert said in " ".join(result.stderr.split())
    assert "left out" in result.stdout
    scores = rf.Scores.load("results/scores.zarr")
    assert not scores.values[:, [0, 5, 39]].any()
    task, train, test = sys.modules[module].good()
    weights = torch.ones(40)
    weights[[0, 5, 39]] = 0.0
    plain = rf.Influence(task, solver=rf.solvers.Gram(), damping=0.1, progress=False).fit(train, weights=weights)
    torch.testing.assert_close(scores.values, plain.score(tuple(part[:4] for part in test)).values)
    manifest = json.loads(Path("results/manifest.json").read_text())
    assert manifest["options"]["skip_bad"] is True
    expected = {
        "0": "reading it raises FileNotFoundError: no file 0",
        "5": "the loss is nan",
        "39": "reading it raises FileNotFoundError: no file 39",
    }
    assert manifest["influence"]["skipped_rows"] == expected
    assert scores.manifest["skipped_rows"] == expected
    assert {0, 5, 39}.isdisjoint(pd.read_parquet("results/top.parquet").query("score != 0")["train"])
    page = Path("results/report.html").read_text()
    assert "Examples left out" in page
    assert "no file 0" in page


def test_a_kept_fit_is_used_again_on_the_same_data(module):
    run("attribute", "--task", f"{module}:bad", "--out", "one", "--skip-bad", "--save-fit", "kept", "--no-report")
    result = run("attribute", "--task", f"{module}:bad", "--out", "two", "--fit", "kept", "--no-report")
    assert "3 of 40 training examples are left out" in " ".join(result.stdout.split())
    found, expected = (rf.Scores.load(f"{folder}/scores.zarr") for folder in ("two", "one"))
    assert torch.equal(found.values, expected.values)
    assert found.manifest["skipped_rows"] == expected.manifest["skipped_rows"]
    result = run("attribute", "--task", f"{module}:bad", "--out", "three", "--fit", "kept", "--verify", 2, code=1)
    assert "the fit left out 3 bad examples, and the refits leave out none" in result.stderr
    result = run("attribute", "--task", f"{module}:bad", "--out", "two", "--fit", "kept", "--skip-bad", code=2)
    assert "--skip-bad" in result.stderr
