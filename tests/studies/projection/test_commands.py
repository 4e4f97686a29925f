"""`refluence study spectrum-bounds` and its sisters: both spellings, the published defaults, refusals."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from refluence.cli import app
from refluence.studies.projection import (
    barrier,
    certificate,
    factorized_edim,
    faithfulness_utility,
    hyperparam_selection,
    leakage,
    spectrum_bounds,
)

MODULES = {
    "spectrum-bounds": spectrum_bounds,
    "hyperparam-selection": hyperparam_selection,
    "faithfulness-utility": faithfulness_utility,
    "factorized-edim": factorized_edim,
    "barrier": barrier,
    "leakage": leakage,
    "certificate": certificate,
}
GRID = ["--m_exp_min=3", "--m_exp_max", "9", "--m_steps", "4", "--lambda_exp_min=-3", "--lambda_exp_max=1"]
GRID += ["--lambda_steps", "7"]
SKETCHES = ["--proj_type", "sjlt", "--num_trials", "2", "--seed", "7", "--offload", "disk"]
PROBLEM = ["--dataset", "digits", "--model", "lr", "--num_test_grads", "30"]


def call(study, *arguments, code=0):
    result = CliRunner().invoke(app, ["study", study, *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def asked(monkeypatch):
    """(options, folder, keywords) of the studies that would be done, instead of doing them."""
    given = []

    def run(options, out, **more):
        given.append((options, out, more))
        return {}

    for module in MODULES.values():
        monkeypatch.setattr(module, "run", run)
    return given


def hyphened(arguments):
    return [a.replace("_", "-") if a.startswith("--") else a for a in arguments]


@pytest.mark.parametrize("spelled", [list, hyphened])
def test_spectrum_bounds_takes_the_published_options_in_both_spellings(spelled, asked, tmp_path):
    more = ["--test_mode", "test", "--min_d_lambda", "2.5", "--cache_dir", str(tmp_path), "--batch_size", "16"]
    call("spectrum-bounds", *spelled([*PROBLEM, *SKETCHES, *GRID, *more, "--output_dir", "x_y", "--quiet"]))
    [(options, out, keywords)] = asked
    assert (options.problem.dataset, options.problem.model, options.problem.num_test_grads) == ("digits", "lr", 30)
    assert options.problem.batch_size == 16
    sketching = options.sketching
    assert (sketching.proj_type, sketching.num_trials, sketching.seed, sketching.offload) == ("sjlt", 2, 7, "disk")
    assert options.sizes.below(10**9) == [8, 32, 128, 512]
    assert options.dampings.values() == pytest.approx([10 ** (-3 + 4 * i / 6) for i in range(7)])
    assert (options.test_mode, options.min_d_lambda) == ("test", 2.5)
    assert (out, keywords["cache_dir"], keywords["progress"]) == (Path("x_y"), tmp_path, False)


@pytest.mark.parametrize("spelled", [list, hyphened])
@pytest.mark.parametrize("study", ["hyperparam-selection", "faithfulness-utility"])
def test_studies_of_utility_take_them_too(study, spelled, asked, tmp_path):
    truth = ["--val_ratio", "0.2", "--num_subsets", "9", "--models_per_subset", "2", "--ground_truth", str(tmp_path)]
    own = ["--faithfulness_threshold", "0.3", "--num_test_samples", "11"] if study.startswith("faith") else []
    call(study, *spelled([*PROBLEM, *SKETCHES, *GRID, *truth, *own, "--out", "o", "--quiet"]))
    [(options, out, keywords)] = asked
    retraining = options.retraining
    assert (retraining.val_ratio, retraining.num_subsets, retraining.models_per_subset) == (0.2, 9, 2)
    assert (out, keywords["ground_truth"]) == (Path("o"), tmp_path)
    assert options.sizes.below(10**9) == [8, 32, 128, 512]
    if own:
        assert (options.faithfulness_threshold, options.num_test_samples) == (0.3, 11)


def test_the_defaults_are_the_published_ones(asked):
    for study in MODULES:
        call(study, "--quiet")
    spectrum, selection, utility, edim, _, _, certificates = asked
    for options, _, _ in (spectrum, selection, utility):
        problem, sketching = options.problem, options.sketching
        assert (problem.dataset, problem.model, problem.num_test_grads) == ("mnist", "mlp", 500)
        assert (problem.n_train, problem.n_test) == (None, None)  # the published numbers, see the zoo
        assert (sketching.proj_type, sketching.num_trials, sketching.seed) == ("normal", 5, 42)
        assert options.dampings.values() == pytest.approx([10.0**e for e in range(-8, 3)])
        assert sketching.offload == "cpu"
    assert spectrum[0].sizes.below(109_386) == [2**e for e in range(2, 17)]
    assert selection[0].sizes.below(109_386) == utility[0].sizes.below(109_386) == [2**e for e in range(5, 17)]
    assert (spectrum[0].test_mode, spectrum[0].min_d_lambda) == ("self", 1.0)
    assert selection[0].retraining.val_ratio == 0.1
    assert (utility[0].faithfulness_threshold, utility[0].num_test_samples) == (0.01, 500)
    assert (edim[0].problem.model, edim[0].compute_full_fisher) == ("lr", False)
    assert spectrum[1] == Path("results/spectrum_bounds/mnist_mlp_normal_self")
    assert edim[1] == Path("results/factorized_edim/mnist_lr")
    assert (certificates[0].dimension, certificates[0].ratios) == (60, (1.5, 2, 4, 8))


@pytest.mark.parametrize("study", MODULES)
def test_defaults_are_those_of_the_settings(study, asked):
    """But for the model of factorized-edim, which is the published script's."""
    call(study, "--quiet")
    [(options, _, keywords)] = asked
    assert options.record() == type(options)().record() | ({"model": "lr"} if study == "factorized-edim" else {})
    assert keywords["cache_dir"] is None


def test_theory_s_studies_take_their_own_options(asked):
    call("barrier", "--ratio_max", "2", "--ratio-steps=3", "--quiet")
    call("leakage", "--factor_rows", "9", "--factor_draws", "0", "--quiet")
    call("certificate", "--dimension", "7", "--ratios", "1.5,3", "--n_train", "50", "--quiet")
    call("factorized-edim", "--compute_full_fisher", "--dtype", "float32", "--quiet")
    (lost, _, _), (leaked, _, _), (certified, _, _), (edim, _, _) = asked
    assert (lost.ratio_max, lost.ratio_steps) == (2, 3)
    assert (leaked.factors.factor_rows, leaked.factors.factor_draws) == (9, 0)
    assert (certified.dimension, certified.ratios, certified.problem.n_train) == (7, (1.5, 3), 50)
    assert (edim.compute_full_fisher, edim.problem.dtype) == (True, "float32")


@pytest.mark.parametrize(
    ("study", "arguments", "message"),
    [
        ("spectrum-bounds", ["--proj_type", "fjlt"], "normal"),
        ("spectrum-bounds", ["--test_mode", "train"], "self"),
        ("spectrum-bounds", ["--faithfulness_threshold", "1"], "No such option"),
        ("hyperparam-selection", ["--num_subsets", "2"], "--num-subsets"),
        ("barrier", ["--m_exp_max", "3"], "No such option"),
        ("certificate", ["--ratios", "1.5;2"], "no list such as 1.5,2,4,8"),
    ],
)
def test_what_cannot_be_is_a_usage_error(study, arguments, message, asked):
    assert message in call(study, *arguments, code=2)
    assert not asked


@pytest.mark.parametrize(
    ("study", "arguments", "message"),
    [
        ("spectrum-bounds", ["--m_exp_min", "9", "--m_exp_max", "5"], "are no range"),
        ("spectrum-bounds", ["--lambda_exp_min", "3"], "are no range"),
        ("faithfulness-utility", ["--val_ratio", "1.0"], "between 0 and 1"),
        ("leakage", ["--factor_exp_min", "9"], "has no sizes"),
    ],
)
def test_contradictions_are_errors_that_say_what_to_change(study, arguments, message, asked):
    assert message in " ".join(call(study, *PROBLEM, *arguments, "--quiet", code=1).split())
    assert not asked


def test_a_study_from_the_command_line(tmp_path):
    arguments = ["--dataset", "digits", "--model", "lr", "--n_train", "60", "--n_test", "20", "--epochs", "3"]
    arguments += ["--num_trials", "2", "--m_exp_max", "6", "--lambda_exp_min", "-2", "--lambda_exp_max", "0"]
    printed = call("spectrum-bounds", *arguments, "--test_mode", "test", "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert f"{summary['eps_plateau'][0]:.3g}" in printed
    again = call("spectrum-bounds", *arguments, "--test_mode", "self", "--out", tmp_path / "out", code=1)
    assert "with test_mode 'test', not 'self'" in " ".join(again.split())
