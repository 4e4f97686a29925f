"""Each study end to end on a tiny problem: files, resuming after a kill, and numbers from the definitions."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch.testing import assert_close

from refluence.errors import DataError
from refluence.evaluation import GroundTruth
from refluence.sketches import SJLT
from refluence.studies import folder as folder_module
from refluence.studies.projection import (
    barrier,
    faithfulness_utility,
    hyperparam_selection,
    leakage,
    output,
    spectrum_bounds,
)
from refluence.studies.projection import factorized_edim as edim
from refluence.studies.projection.factor_leakage import FactorGrid
from refluence.studies.projection.gaussian import GramGaussian
from refluence.studies.projection.grid import Dampings, Sizes, Sketching
from refluence.studies.projection.utility import Retraining, UtilityMeter, best_damping
from support.projection import OPTIONS

SKETCHING, SIZES, DAMPINGS = Sketching(num_trials=2), Sizes(3, 7), Dampings(-3, 0)
TRUTH = Retraining(num_subsets=8, val_ratio=0.25)
STUDIES = {
    "spectrum-bounds": (spectrum_bounds, spectrum_bounds.SpectrumBounds(OPTIONS, SKETCHING, SIZES, DAMPINGS, "test")),
    "spectrum-bounds, self": (
        spectrum_bounds,
        spectrum_bounds.SpectrumBounds(OPTIONS, Sketching("sjlt", 2), SIZES, DAMPINGS, "self"),
    ),
    "hyperparam-selection": (
        hyperparam_selection,
        hyperparam_selection.HyperparamSelection(OPTIONS, SKETCHING, SIZES, DAMPINGS, TRUTH),
    ),
    "faithfulness-utility": (
        faithfulness_utility,
        faithfulness_utility.FaithfulnessUtility(OPTIONS, SKETCHING, SIZES, DAMPINGS, TRUTH, 0.05, 5),
    ),
    "factorized-edim": (edim, edim.FactorizedEdim(OPTIONS, DAMPINGS, compute_full_fisher=True)),
    "barrier": (barrier, barrier.Barrier(OPTIONS, SKETCHING, 1.5, 5)),
    "leakage": (
        leakage,
        leakage.Leakage(OPTIONS, SKETCHING, Sizes(4, 6), Dampings(-2, 0), factors=FactorGrid(8, 6, 2, 4, 5)),
    ),
}
FILES = {"summary.json", "results.parquet", "report.html", "manifest.json", "stages"}


def undrawn(monkeypatch):
    """Leave out the pictures, which take most of the time."""
    monkeypatch.setattr(output, "write_figure", lambda *_: None)
    monkeypatch.setattr(output, "render", lambda _: "")


class KilledError(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def done(problem, tmp_path_factory):
    """Name → (folder, summary), each study done at once, when first asked for."""
    found = {}

    def of(name):
        if name not in found:
            module, options = STUDIES[name]
            out = tmp_path_factory.mktemp("study") / "out"
            found[name] = out, module.run(options, out, progress=False)
        return found[name]

    return of


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_leaves_its_files_and_says_what_it_did(done, name):
    out, summary = done(name)
    assert {path.name for path in out.iterdir()} >= FILES
    assert summary["study"] == name.partition(",")[0]
    assert all(isinstance(value, (str, int, float, bool, list, type(None))) for value in summary.values())
    assert json.loads((out / "summary.json").read_text()).keys() == summary.keys()
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["status"], manifest["settings"]["dataset"]) == ("complete", "digits")
    figures = {path.stem for path in out.glob("*.png")}
    assert figures
    assert figures == {path.stem for path in out.glob("*.svg")}
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(figures)
    assert not re.search("https?://", page)


@pytest.mark.parametrize("name", ["spectrum-bounds", "spectrum-bounds, self", "hyperparam-selection"])
def test_killed_after_every_stage_it_ends_with_the_same_files(done, name, tmp_path, monkeypatch):
    module, options = STUDIES[name]
    whole, summary = done(name)
    undrawn(monkeypatch)
    original, kills = folder_module.write_tensors, 0

    def killed(*arguments):
        original(*arguments)
        raise KilledError

    monkeypatch.setattr(folder_module, "write_tensors", killed)
    out = tmp_path / "out"
    while True:
        try:
            again = module.run(options, out, progress=False)
            break
        except KilledError:
            kills += 1
    # the ground truth keeps its own files
    stages = [p for p in (whole / "stages").rglob("*.safetensors") if "ground_truth" not in p.parts]
    assert kills == len(stages) - (whole / "stages" / "spectrum.safetensors").exists()
    for file in whole.glob("*.parquet"):
        # sums of numpy depend on where in memory their numbers lie, in the last bit
        pd.testing.assert_frame_equal(pd.read_parquet(out / file.name), pd.read_parquet(file), rtol=1e-12, atol=0)
    assert _same(again, summary)


def _same(one, other):
    """But for the time that it took, and the last bits."""
    assert one.keys() == other.keys()
    for key in one.keys() - {"cpu_seconds"}:
        mine, theirs = np.asarray(one[key]), np.asarray(other[key])
        if mine.dtype.kind == "f":
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, err_msg=key)
        else:
            assert one[key] == other[key], key
    return True


def test_a_finished_study_computes_nothing(done, monkeypatch):
    out, summary = done("spectrum-bounds")
    undrawn(monkeypatch)
    monkeypatch.setattr(folder_module, "write_tensors", lambda *_: pytest.fail("a finished stage was done again"))
    again = spectrum_bounds.run(STUDIES["spectrum-bounds"][1], out, progress=False)
    assert _same(again, summary)


@pytest.mark.parametrize("name", STUDIES)
def test_settings_come_back_from_their_record(name):
    """But for what changes no number, which is not in it; names of other studies are left out."""
    _, options = STUDIES[name]
    plain = type(options)()
    assert plain.record() != options.record()
    again = plain.with_values(options.record() | {"of another study": 1})
    assert again.record() == options.record()
    assert again.problem.batch_size == plain.problem.batch_size != options.problem.batch_size


def test_a_folder_of_other_settings_is_refused(done):
    out, _ = done("spectrum-bounds")
    other = spectrum_bounds.SpectrumBounds(OPTIONS, SKETCHING, SIZES, Dampings(-3, 1), "test")
    with pytest.raises(DataError, match="with lambda_exp_max 0, not 1"):
        spectrum_bounds.run(other, out, progress=False)


def test_the_error_falls_with_the_sketch_size(done):
    """At λ with d_λ well below the sizes: the slope of theory, and the plateau where there is no sketch to speak of."""
    _, summary = done("spectrum-bounds")
    last = len(summary["damping"]) - 1
    assert summary["eps_slope"][last] == pytest.approx(-0.5, abs=0.12)
    assert summary["eps_corrected_slope"][last] == pytest.approx(-0.5, abs=0.12)
    assert summary["eps_smallest_sketch_over_plateau"][0] == pytest.approx(1, abs=0.3)
    assert summary["effective_dimension"] == sorted(summary["effective_dimension"], reverse=True)


def test_dampings_of_too_small_a_dimension_are_left_out(spectral):
    assert spectral.dimension(1.0) > 3 > spectral.dimension(10.0)
    assert spectrum_bounds.kept_dampings(spectral, [0.1, 1.0, 10.0], 3.0) == [0.1, 1.0]
    with pytest.raises(DataError, match="lower min_d_lambda"):
        spectrum_bounds.kept_dampings(spectral, [10.0], 3.0)


def test_utility_without_scores_is_the_lds_of_the_scores(spectral):
    """Against scipy's Spearman, test by test, on score matrices."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(8, 60, generator=generator) < 0.5
    losses = torch.randn(8, 1, 12, generator=generator, dtype=torch.float64)
    truth = GroundTruth(masks, {"loss": losses})
    dampings = (1e-3, 1e-1)
    meter = UtilityMeter(truth, torch.arange(4), torch.arange(4, 12), dampings)
    for system in GramGaussian(spectral).systems(0, [16, 256], {16, 256}):
        measured = meter.measure(system)
        for place, scores in enumerate(system.scores(dampings)):
            sums = masks.double() @ scores
            each = [spearmanr(sums[:, j], -losses[:, 0, j]).statistic for j in range(12)]
            assert float(measured["validation"][place]) == pytest.approx(np.mean(each[:4]), abs=1e-12)
            assert float(measured["test"][place]) == pytest.approx(np.mean(each[4:]), abs=1e-12)
    exact = meter.exact(spectral)
    sums = masks.double() @ spectral.scores(1e-1)
    each = [spearmanr(sums[:, j], -losses[:, 0, j]).statistic for j in range(12)]
    assert float(exact["test"][1]) == pytest.approx(np.mean(each[4:]), abs=1e-12)


def test_damping_is_chosen_by_validation_alone_and_the_split_is_disjoint(done):
    out, summary = done("hyperparam-selection")
    results = pd.read_parquet(out / "results.parquet")
    sweep = results[results["sweep"] == "lambda"]
    assert sweep["m"].unique().tolist() == [summary["m"][-1]] == [128]
    means = sweep.groupby("damping")["validation_lds"].mean()
    assert summary["best_damping"] == means.idxmax()
    assert summary["validation_lds"] == pytest.approx(means.max())
    by_size = results[results["sweep"] == "m"]
    assert by_size["damping"].unique().tolist() == [summary["best_damping"]]
    curve = by_size.groupby("m")["validation_lds"].mean()
    assert summary["m_95"] == curve.index[(curve >= 0.95 * curve.max()).argmax()]
    validation, reported = TRUTH.split(12, 42)
    assert sorted([*validation.tolist(), *reported.tolist()]) == list(range(12))
    assert (summary["validation_tests"], summary["reported_tests"]) == (3, 9)


def test_faithfulness_and_utility_are_those_of_the_same_sketches(done):
    """The LDS at the largest size and every λ agree with hyperparam-selection; λ* never sees a test LDS."""
    results = pd.read_parquet(done("faithfulness-utility")[0] / "results.parquet")
    other = pd.read_parquet(done("hyperparam-selection")[0] / "results.parquet")
    other = other[other["sweep"] == "lambda"]
    mine = results[results["m"] == 128].sort_values(["trial", "damping"])
    other = other.sort_values(["trial", "damping"])
    np.testing.assert_allclose(mine["validation_lds"], other["validation_lds"], atol=1e-12)
    np.testing.assert_allclose(mine["test_lds"], other["test_lds"], atol=1e-12)
    summary = done("faithfulness-utility")[1]
    for place, m in enumerate(summary["m"]):
        rows = results[results["m"] == m]
        assert summary["best_damping"][place] == rows.groupby("damping")["validation_lds"].mean().idxmax()
        for trial, own in zip((0, 1), summary["best_damping_of_trials"][place], strict=True):
            some = rows[rows["trial"] == trial].set_index("damping")
            assert own == some["validation_lds"].idxmax()
    assert results["faithful"].equals(results["eps_95"] <= 0.05)


def test_a_best_damping_needs_an_lds():
    assert best_damping((1.0, 2.0, 3.0), torch.tensor([0.1, float("nan"), 0.3], dtype=torch.float64)) == 2
    with pytest.raises(DataError, match="all scores are constant"):
        best_damping((1.0,), torch.tensor([float("nan")], dtype=torch.float64))


def test_factor_spectra_are_those_of_inputs_and_output_gradients(done, problem):
    """Σ d_λ(A⊗E) from A = mean of (x,1)(x,1)ᵀ and E = mean of eeᵀ with e = softmax − onehot, by the definition."""
    _, summary = done("factorized-edim")
    x, y = problem.train
    inputs = torch.cat([x.flatten(1).double(), torch.ones(60, 1, dtype=torch.float64)], dim=1)
    model = problem.capture.model
    with torch.no_grad():
        errors = model(x.double()).softmax(dim=1) - torch.nn.functional.one_hot(y, 10)
    alpha = torch.linalg.eigvalsh(inputs.T @ inputs / 60)
    gamma = torch.linalg.eigvalsh(errors.T @ errors / 60)
    for place, damping in enumerate(summary["damping"]):
        products = torch.outer(alpha, gamma)
        assert summary["unstructured"][place] == pytest.approx(float((products / (products + damping)).sum()), rel=1e-6)
        by_a = float((alpha / (alpha + damping / gamma.max())).sum())
        by_e = float((gamma / (gamma + damping / alpha.max())).sum())
        assert summary["factorised"][place] == pytest.approx(by_a * by_e, rel=1e-6)


def test_below_the_rank_scores_are_lost_and_from_it_on_exact(done):
    _, summary = done("barrier")
    rank = summary["rank"]
    for m, lost, mean, largest in zip(
        summary["m"], summary["lost"], summary["self_mean"], summary["eps_max"], strict=True
    ):
        assert lost == max(0, rank - m)
        assert mean == pytest.approx(max(0, 1 - m / rank), abs=1e-6)
        assert (largest > 1e-3) == (m < rank)


def test_the_barrier_is_measured_by_projections(spectral):
    """Against the projection on the rows of P F^{1/2}, formed densely."""
    meter, rank = barrier.BarrierMeter(spectral), spectral.cut
    (system,) = GramGaussian(spectral).systems(0, [rank // 2], {rank // 2})
    rows = (spectral.basis[:, :rank].T @ system.left).T / spectral.n**0.5
    projection = torch.linalg.pinv(rows, rtol=1e-14) @ rows
    train = spectral.n**0.5 * spectral.basis[:, :rank]
    tests = spectral.tests[:, :rank] / spectral.roots[:rank]
    missing = train @ (torch.eye(rank, dtype=torch.float64) - projection) @ tests.T
    errors = missing.abs() / torch.outer(train.norm(dim=1), tests.norm(dim=1))
    measured = meter.measure(system)
    assert_close(measured["eps"][1], errors.max(), rtol=1e-4, atol=0)
    assert_close(measured["eps"][0], errors.mean(), rtol=1e-4, atol=0)


def test_leakage_is_as_large_as_predicted(done):
    out, summary = done("leakage")
    assert summary["tests_outside"] == 12
    assert summary["ratio_of_all"] == pytest.approx(1, abs=0.15)
    assert summary["covered_of_all"] == pytest.approx(0.95, abs=0.04)
    per_test = pd.read_parquet(out / "tests.parquet")
    assert len(per_test) == 2 * 3 * len(summary["damping"]) * 12
    parts = pd.read_parquet(out / "factorised.parquet")
    assert {"ker A ⊗ range E"} <= set(parts["part"])


def test_projected_leakage_is_that_of_the_kernel_part(problem, spectral, gradients):
    """(P v_⊥)ᵀ(PFPᵀ+λ)⁻¹Pg with v_⊥ formed in d dimensions, both sides of the sketch."""
    train, tests = gradients
    _, values, basis = torch.linalg.svd(train, full_matrices=False)
    basis = basis[values > 1e-6 * values[0]]
    outside = tests - tests @ basis.T @ basis
    source = leakage.kernel_source(problem, spectral, Sketching("sjlt"), None)
    for system in source.systems(4, [16, 128], {16, 128}):
        sketch = SJLT(system.size, seed=4).matrix(train.shape[1])
        rows = train @ sketch.T
        inner = rows.T @ rows / 60 + 0.1 * torch.eye(system.size, dtype=torch.float64)
        solved = torch.linalg.solve(inner, rows.T)
        exact = rows @ torch.linalg.solve(inner, sketch @ outside.T)
        assert_close(next(system.scores([0.1])), exact, rtol=1e-5, atol=1e-8 * float(exact.abs().max()))
        norms = outside.norm(dim=1)
        measured = leakage.LeakageMeter(norms, (0.1,)).measure(system)
        deviations = torch.outer(solved.norm(dim=0), norms) / system.size**0.5
        assert_close(measured["measured"][0], exact.square().mean(dim=0), rtol=1e-5, atol=0)
        assert_close(measured["predicted"][0], deviations.square().mean(dim=0), rtol=1e-5, atol=0)
        covered = (exact.abs() <= 1.959963984540054 * deviations).double().mean()
        assert float(measured["covered"][0]) == pytest.approx(float(covered), abs=2e-3)
