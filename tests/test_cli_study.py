"""`refluence study`: spellings, settings, refusals; a run is in tests/studies/test_leave_one_out.py."""

import pytest

from refluence.studies import leave_one_out
from support.cli import run


def call(*arguments, code=0):
    return run("study", "leave-one-out", *arguments, code=code)


@pytest.fixture
def asked(monkeypatch):
    """The options of the study that would be done, instead of doing it."""
    given = []

    def run(options, out, progress):
        given.append(options)
        return {}

    monkeypatch.setattr(leave_one_out, "run", run)
    return given


@pytest.mark.parametrize("flags", [["--test-mode"], ["--test_mode"], ["--setting=digits"], ["--dataset", "digits"]])
def test_the_digits_can_be_asked_for_in_every_spelling(flags, asked, tmp_path):
    call("--out", tmp_path / "made_of_parts", *flags, "--quiet")
    assert [options.setting.name for options in asked] == ["digits"]


def test_the_paper_is_the_default_and_its_numbers_are_the_paper_s(asked, tmp_path):
    call("--out", tmp_path, "--quiet")
    call("--out", tmp_path, "--quiet", "--dataset", "mnist", "--top", 7, "--seed", 2)
    paper, other = asked
    assert (paper.setting.name, paper.setting.l2, paper.setting.bias, paper.setting.test) == ("paper", 0.01, False, 8)
    assert (paper.top, paper.seed, paper.subsets) == (500, 0, 1)
    assert (other.setting.name, other.top, other.seed) == ("paper", 7, 2)


def test_the_reduced_setting_can_be_repeated(asked, tmp_path):
    call("--out", tmp_path, "--quiet", "--setting", "reduced", "--subsets", 5)
    assert (asked[0].setting.name, asked[0].subsets, asked[0].top) == ("reduced", 5, 200)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--test-mode", "--setting", "paper"], "is the digits setting, not paper"),
        (["--test-mode", "--dataset", "mnist"], "runs on the digits, not on mnist"),
        (["--setting", "reduced", "--dataset", "digits"], "on mnist, not on digits"),
        (["--subsets", "3"], "has all its train rows"),
        (["--top", "60000"], "of 55000 train rows"),
        (["--top", "2"], "--top"),
        (["--setting", "cifar"], "paper"),
        (["--damping", "0.1"], "No such option"),
        (["--damping_factor", "0.1"], "No such option"),
    ],
)
def test_options_that_cannot_be_are_refused(flags, message, asked, tmp_path):
    assert message in call("--out", tmp_path, *flags, code=2).output
    assert not asked
