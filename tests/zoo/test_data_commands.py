"""`refluence data` and the data of `refluence doctor`."""

import pytest

from refluence.zoo import dataset_names
from support import cli


@pytest.fixture
def run(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("REFLUENCE_DATA", str(tmp_path / "data"))
    return cli.run


def test_list_shows_every_set_with_its_size_and_whether_it_is_here(run):
    lines = {line.split()[0]: line for line in run("data", "list").stdout.splitlines()}
    assert set(dataset_names()) <= set(lines)
    assert "comes with scikit-learn" in lines["digits"]
    for name, size in {
        "mnist": "11.6 MB",
        "cifar10": "170.5 MB",
        "maestro": "59.2 MB",
        "shakespeare": "1.1 MB",
    }.items():
        assert size in lines[name]
        assert " no" in lines[name]


def test_path_of_a_set_and_of_downloads(run, cache):
    assert run("data", "path").stdout.strip() == str(cache / "data")
    assert run("data", "path", "digits").stdout.strip() == "comes with scikit-learn"
    assert "refluence data fetch shakespeare" in run("data", "path", "tinyshakespeare", code=1).stderr


@pytest.mark.parametrize("command", ["fetch", "path"])
def test_an_unknown_name_lists_the_known_ones(run, command):
    assert "maestro" in run("data", command, "imagenet", code=2).stderr


def test_fetch_of_what_is_here_downloads_nothing(run):
    assert run("data", "fetch", "digits").stdout == "digits: comes with scikit-learn\n"


def test_doctor_lists_every_set(run):
    output = run("doctor").stdout
    for name in dataset_names():
        assert f"\n{name} " in output
    assert "(170.5 MB)" in output
