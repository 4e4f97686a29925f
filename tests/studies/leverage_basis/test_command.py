"""`refluence study leverage-basis`: what its options ask for."""

import pytest

from refluence.studies import leverage_basis
from refluence.studies.leverage_basis import DEFAULTS
from support.cli import run


def call(*arguments, code=0):
    return run("study", "leverage-basis", *arguments, code=code)


@pytest.fixture
def asked(monkeypatch):
    """The options of the study that would be done, instead of doing it."""
    given = []

    def run(options, out, progress):
        given.append(options)
        return {}

    monkeypatch.setattr(leverage_basis, "run", run)
    return given


@pytest.mark.parametrize("flags", [["--test-mode"], ["--test_mode"], ["--dataset", "digits"]])
def test_the_digits_are_a_quick_run(flags, asked, tmp_path):
    call("--out", tmp_path / "lb", "--quiet", *flags)
    assert asked == [DEFAULTS["digits"]]


def test_mnist_is_the_default_and_every_option_arrives(asked, tmp_path):
    call("--out", tmp_path, "--quiet")
    call(
        *("--out", tmp_path, "--quiet", "--seeds", 3, "--epochs", 2, "--dimension", 7, "--sizes", "100,10,100"),
        *("--steps", 4, "--convolutional_sizes", 0, "--convolutional-steps", 9, "--greedy", 50),
    )
    default, other = asked
    assert default == DEFAULTS["mnist"]
    assert (default.seeds, default.epochs, default.channels, default.embedding) == (5, 5, (32, 64), 200)
    assert (other.seeds, other.epochs, other.dimension, other.sizes) == (3, 2, 7.0, (10, 100))
    assert (other.steps, other.convolutional_sizes, other.convolutional_steps, other.greedy) == (4, (), 9, 50)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sizes", "many"], "no list of numbers"),
        (["--sizes", "-3,10"], "-3 rows cannot be selected"),
        (["--seeds", "1"], "'--seeds'"),
    ],
)
def test_wrong_options_are_refused(flags, message, asked, tmp_path):
    result = call("--out", tmp_path, *flags, code=2)
    assert message in result.output
    assert not asked
