"""Koh & Liang's Figure 2 on the digits, end to end; on MNIST what its settings name."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.stats import linregress, pearsonr, spearmanr

from refluence.errors import DataError
from refluence.studies import folder as folder_module
from refluence.studies.leave_one_out import SETTINGS, Options, run
from refluence.studies.leave_one_out.settings import load_problem
from refluence.zoo import load_dataset
from support.cli import run as run_command

pytestmark = pytest.mark.slow

METHODS = ("exact", "cg", "lissa", "lissa_paper", "newton")
SMALL = dataclasses.replace(SETTINGS["digits"], drawn=300, seeds=1, l2=1e-2)
OPTIONS = Options(SMALL, seed=3, subsets=2, top=12)
STAGES = {"optimum", "exact", "newton", "refits", "cg", "lissa", "lissa_paper_seed0"}
FIRST = {*STAGES, "lissa_truncated_mean"}  # of the first subset, which the figure shows


class KilledError(Exception):
    """Stands for a kill."""


@dataclasses.dataclass(frozen=True)
class Done:
    """What the command line left and printed."""

    folder: Path
    printed: str
    kills: int

    @property
    def summary(self):
        return json.loads((self.folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def digits():
    """The digits, small, in the place of the study's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETTINGS, "digits", SMALL)
        yield


@pytest.fixture(scope="module")
def done(digits, tmp_path_factory):
    """A study of two subsets, killed after every stage and taken up again."""
    out, kills = tmp_path_factory.mktemp("study") / "out_of_place", 0
    original = folder_module.write_tensors

    def killed(*arguments):
        original(*arguments)
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_module, "write_tensors", killed)
        while True:
            try:
                return Done(out, command(f"--out={out}", "--test_mode").stdout, kills)
            except KilledError:
                kills += 1


def command(*arguments, code=0):
    return run_command("study", "leave-one-out", "--top", 12, "--subsets", 2, "--seed", 3, *arguments, code=code)


@pytest.fixture(scope="module")
def frame(done):
    return pd.read_parquet(done.folder / "results.parquet")


def objective(x, y, weights, l2):
    """Value and gradient of Σ w ℓ/Σ w + (l2/2)‖θ‖² of a softmax regression with bias, for scipy."""

    def values(theta):
        parameters = torch.tensor(theta.reshape(10, -1), requires_grad=True)
        losses = F.cross_entropy(x @ parameters[:, :-1].T + parameters[:, -1], y, reduction="none")
        value = (losses * weights).sum() / weights.sum() + l2 / 2 * parameters.square().sum()
        value.backward()
        return value.item(), parameters.grad.numpy().ravel()

    return values


def minimum(x, y, weights, l2, start):
    return minimize(
        objective(x, y, weights, l2),
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "gtol": 1e-10, "ftol": 0},
    ).x


def test_the_actual_changes_are_those_of_refits_by_another_optimiser(frame):
    """Also that the rows name the examples: they index the data set's own train rows."""
    data = load_dataset("digits")
    drawn = torch.randperm(len(data.train[1]), generator=torch.Generator().manual_seed(3))[: SMALL.drawn]
    x, y = data.train[0][drawn].flatten(1).double(), data.train[1][drawn]
    everything = torch.ones(len(y), dtype=torch.float64)
    theta = minimum(x, y, everything, SMALL.l2, np.zeros(10 * 65))
    tests = data.test[0].flatten(1).double()

    def losses(theta):
        parameters = torch.tensor(theta.reshape(10, -1))
        return F.cross_entropy(tests @ parameters[:, :-1].T + parameters[:, -1], data.test[1], reduction="none")

    parameters = torch.tensor(theta.reshape(10, -1))
    wrong = ((tests @ parameters[:, :-1].T + parameters[:, -1]).argmax(dim=1) != data.test[1]).nonzero()[0, 0]
    first = frame[frame["subset"] == 0]
    for row, label, actual in zip(first["row"][:4], first["label"][:4], first["actual"][:4], strict=True):
        weights = everything.clone()
        weights[(drawn == row).nonzero()[0, 0]] = 0
        change = (losses(minimum(x, y, weights, SMALL.l2, theta)) - losses(theta))[wrong]
        assert label == data.train[1][row]
        assert actual == pytest.approx(float(change), rel=1e-3, abs=1e-7)


def test_every_refit_converged(done, frame):
    assert done.summary["refits"] == done.summary["refits_converged"] == len(frame) == 24
    assert (frame["gradient_norm"] <= 1e-8).all()
    assert done.summary["largest_baseline_change"] < 1e-8


def test_predictions_are_as_good_as_theory_says(done):
    summary = done.summary
    assert summary["exact"]["pearson"] > 0.99
    assert summary["cg"]["slope"] == pytest.approx(summary["exact"]["slope"], abs=1e-4)
    assert summary["lissa"]["slope"] == pytest.approx(summary["exact"]["slope"], abs=0.02)
    assert summary["newton"]["pearson"] > 0.9999
    assert abs(summary["newton"]["slope"] - 1) < 0.3 * abs(summary["exact"]["slope"] - 1)
    assert summary["newton"]["r2"] > summary["exact"]["r2"] > summary["lissa_paper"]["r2"]


def test_the_summary_is_the_median_over_subsets_of_what_the_rows_give(done, frame):
    for key in METHODS:
        found = []
        for _, part in frame.groupby("subset"):
            predicted, actual = part[f"predicted_{key}"], part["actual"]
            residual = ((actual - predicted) ** 2).sum() / ((actual - actual.mean()) ** 2).sum()
            slope = linregress(actual, predicted).slope
            found.append(
                [pearsonr(predicted, actual).statistic, spearmanr(predicted, actual).statistic, slope, 1 - residual]
            )
        expected = dict(zip(("pearson", "spearman", "slope", "r2"), np.median(found, axis=0), strict=True))
        assert {name: done.summary[key][name] for name in expected} == pytest.approx(expected, rel=1e-9)


def test_the_command_line_prints_the_numbers_and_refuses_other_settings(done):
    for method in METHODS:
        assert {"pearson", "spearman", "slope", "r2"} <= set(done.summary[method])
        assert f"{done.summary[method]['pearson']:.6f}" in done.printed
    assert "24 of 24 refits converged" in done.printed
    again = command("--out", done.folder, "--test-mode", "--top", 6, code=1)
    assert "with top 12, not 6" in again.output


def test_the_page_holds_the_figures_the_findings_and_no_link_to_the_network(done):
    page = (done.folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("<article>") == len(METHODS) + len(SMALL.truncated)
    assert "24 of 24" in page
    assert f"{done.summary['exact']['slope']:.4f}" in page
    assert {"figure.svg", "figure.png", "leverage.png", "statistics.parquet"} <= {p.name for p in done.folder.iterdir()}


def test_a_second_run_computes_nothing_and_gives_the_same(done, monkeypatch):
    def never(*_):
        raise AssertionError("a finished stage was done again")

    monkeypatch.setattr(folder_module, "write_tensors", never)
    before = done.summary
    assert run(OPTIONS, done.folder, progress=False) == before == done.summary


def test_a_kill_loses_no_finished_stage(done):
    """Each run did one stage more: none was done twice, and none was left out."""
    for index, stages in enumerate((FIRST, STAGES)):
        assert {path.stem for path in (done.folder / f"stages/subset{index}").glob("*.safetensors")} == stages
    assert done.kills == len(FIRST) + len(STAGES)
    assert json.loads((done.folder / "manifest.json").read_text())["status"] == "complete"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "with seed 3, not 4"),
        ({"top": 5}, "with top 12, not 5"),
        ({"subsets": 1}, "with subsets 2, not 1"),
    ],
)
def test_a_folder_of_other_settings_is_refused(done, change, message):
    with pytest.raises(DataError, match=message):
        run(dataclasses.replace(OPTIONS, **change), done.folder, progress=False)


def test_a_folder_of_something_else_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty and holds no study"):
        run(OPTIONS, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_without_mnist_the_error_says_how_to_get_it_and_what_needs_none(tmp_path, monkeypatch):
    monkeypatch.setenv("REFLUENCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("REFLUENCE_DATA", raising=False)
    with pytest.raises(DataError, match=r"(?s)Three ways to get it.*--test-mode"):
        load_problem(SETTINGS["paper"], 0)


@pytest.mark.data
@pytest.mark.skipif("REFLUENCE_DATA" not in os.environ, reason="$REFLUENCE_DATA is not set: no MNIST files")
def test_the_data_of_the_paper_are_the_last_55000_images_in_256_grey_levels():
    problem = load_problem(SETTINGS["paper"], 0)
    assert problem.train[0].shape == (55_000, problem.varying)
    assert problem.pixels == 784
    assert problem.rows.tolist() == list(range(5_000, 60_000))
    levels = problem.train[0][:2_000] * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-12)
    assert int(problem.test[1][8]) == 5
    reduced = load_problem(SETTINGS["reduced"], 0)
    assert len(set(reduced.rows.tolist())) == 20_000
