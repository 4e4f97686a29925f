"""`--store`, `--offload`, `--scheduler` and what belongs to them: the same scores, and clear errors."""

import json
import pickle
import sys
import textwrap
import uuid
from dataclasses import replace
from importlib import metadata

import cloudpickle
import pytest
import torch

import refluence as rf
from refluence.cli.execution_options import ExecutionChoice, OffloadName
from refluence.cli.method import Method
from refluence.cli.methods import parse_methods
from refluence.cli.problem import Source
from refluence.zoo import load_benchmark, load_train
from support.cli import run

N = 200
DIGITS = ("--dataset", "digits", "--model", "lr", "--n-train", N, "--label-noise", 0.1, "--seed", 3)
SKETCHED = ("--solver", "sketched", "--sketch-size", 128, "--damping", 1e-2, "--batch-size", 40)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache for all tests here, so that a model is trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFLUENCE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def attribute(folder, *options, of=(*DIGITS, *SKETCHED)):
    """The scores of a run, its manifest and what it printed."""
    printed = run("attribute", *of, "--out", folder, "--no-report", *options).stdout
    manifest = json.loads((folder / "manifest.json").read_text())
    return rf.Scores.load(folder / "scores.zarr").values, manifest, " ".join(printed.split())


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The scores without any of these options."""
    values, manifest, _ = attribute(tmp_path_factory.mktemp("plain") / "results")
    assert "store" not in manifest["diagnostics"]
    return values


# ------------------------------------------------------------------ the same scores


def test_a_second_run_reads_the_stored_gradients_and_gives_the_same_scores(tmp_path, expected):
    store = tmp_path / "gradients"
    for name, read, made in (("one", 0, N), ("two", N, 0)):
        values, manifest, printed = attribute(tmp_path / name, "--store", store)
        assert torch.equal(values, expected)
        found = manifest["diagnostics"]["store"]
        assert (found["rows_read"], found["rows_made"]) == (read, made)
        assert manifest["options"]["store"] == str(store)
        assert f"store {read} rows read, {made} made, in " in printed


def test_rows_of_a_file_and_their_type(tmp_path, expected):
    options = ("--store", tmp_path / "gradients", "--shard-rows", 80, "--store-dtype", "float16")
    first, manifest, _ = attribute(tmp_path / "one", *options)
    assert len(list((tmp_path / "gradients").glob("*.zarr.zip"))) == 3
    found = manifest["diagnostics"]["store"]
    assert found["dtype"] == "float16"
    assert 0 < found["rounding_error"]["full"] < 1e-3
    assert (first - expected).norm() < 5e-3 * expected.norm()
    assert not torch.equal(first, expected)
    assert {manifest["options"][name] for name in ("shard_rows", "store_dtype")} == {80, "float16"}
    assert torch.equal(attribute(tmp_path / "two", *options)[0], first)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_rows_held_elsewhere(tmp_path, expected, offload):
    values, manifest, _ = attribute(tmp_path / "results", "--offload", offload)
    assert torch.equal(values, expected)
    assert manifest["options"]["offload"] == offload


def test_two_workers_of_this_machine_give_the_same_scores_and_fill_the_store(tmp_path, expected, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.chdir(tmp_path)
    options = ("--scheduler", "local", "--store", "gradients", "--shard-rows", 80)
    for name, read, made in (("one", 0, N), ("two", N, 0)):
        values, manifest, _ = attribute(tmp_path / name, *options)
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
        found = manifest["diagnostics"]["store"]
        assert (found["rows_read"], found["rows_made"]) == (read, made)
    assert manifest["options"]["scheduler"] == "local"
    assert len(list((tmp_path / "gradients").glob("*.zarr.zip"))) == 3


def test_an_evaluation_stores_the_rows_of_each_method(tmp_path):
    methods = ("--methods", "fisher:gram,fisher:sketched", "--sketch-size", 128, "--damping", 0.1)
    what = ("--metrics", "retrieval", "--baselines", "none", "--test-rows", "0:20")
    for name in ("one", "two"):
        run("evaluate", *DIGITS, *methods, *what, "--store", tmp_path / "gradients", "--out", tmp_path / name, "-q")
    for method in ("fisher-gram", "fisher-sketched"):
        assert list((tmp_path / "gradients" / method).glob("*.zarr.zip"))
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert first == second


# ------------------------------------------------------------------ what goes to the workers


def test_workers_load_built_in_rows_themselves():
    problem = Source("digits", "lr", seed=3, label_noise=0.1, n_train=N).load(progress=False)
    rows = problem.rows_for(rf.Execution(cluster="local"))
    assert rows() is problem.train
    assert problem.rows_for(rf.Execution()) is problem.train
    sent = cloudpickle.dumps(rows)
    assert len(sent) < 1000
    for loaded, here in zip(pickle.loads(sent)(), problem.train, strict=True):
        assert torch.equal(loaded, here)


@pytest.mark.parametrize("options", [{}, {"label_noise": 0.3, "seed": 5}, {"n_train": 100, "label_noise": 0.1}])
def test_train_rows_alone_are_those_of_the_benchmark(options):
    expected = load_benchmark("digits", "lr", epochs=1, progress=False, **options).train
    for found, rows in zip(load_train("digits", "lr", **options), expected, strict=True):
        assert torch.equal(found, rows)


MODULE = """
    import torch
    import refluence as rf
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x)

    def load():
        x, y = torch.randn(40, 4, generator=torch.manual_seed(1)), torch.arange(40) % 3
        return x, y

    def data():
        torch.manual_seed(0)
        return rf.Task(Net()), load(), load()

    def loader():
        task, _, test = data()
        return task, load, test
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A user's file, whose folder is importable for this test only."""
    path = tmp_path / f"users_{uuid.uuid4().hex}.py"
    path.write_text(textwrap.dedent(MODULE))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield path
    sys.modules.pop(path.stem, None)


def test_what_a_file_defines_is_sent_whole(file):
    problem = Source(task=f"{file}:loader").load()
    sent = cloudpickle.dumps((problem.task, problem.rows_for(rf.Execution(cluster="local"))))
    inputs, labels = problem.train
    expected = problem.task.model(inputs)
    del sys.modules[file.stem]
    file.unlink()
    task, load = pickle.loads(sent)
    assert torch.equal(load()[1], labels)
    assert torch.equal(task.model(load()[0]), expected)


def test_a_function_that_loads_the_train_rows_stands_for_them(file, tmp_path):
    of = ("--damping", 0.1, "--solver", "gram", "--test-rows", "all")
    found, same = (attribute(tmp_path / name, "--task", f"{file}:{name}", of=of)[0] for name in ("loader", "data"))
    assert torch.equal(found, same)


def test_a_relative_store_is_the_same_folder_for_every_worker(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ExecutionChoice(store="a/b", scheduler="local").build().store == str(tmp_path / "a" / "b")
    assert ExecutionChoice(store="s3://a/b", scheduler="local").build().store == "s3://a/b"
    assert ExecutionChoice(store="a/b").build().store == "a/b"


def test_methods_have_folders_of_their_own_in_the_store_and_what_their_solver_takes():
    choice = ExecutionChoice("1GB", store="x/", offload=OffloadName.DISK, shard_rows=8)
    methods = parse_methods("fisher:gram,fisher:gram:0.1,ggn:kfac", Method(execution=choice))
    gram = replace(choice, store="x/fisher-gram")
    assert methods["fisher:gram"].execution == gram
    assert methods["fisher:gram:0.1"].execution == gram
    assert methods["ggn:kfac"].execution == ExecutionChoice("1GB", store="x/ggn-kfac", shard_rows=8)


# ------------------------------------------------------------------ errors


def refusal(*options, code=2):
    """What is said, on one line."""
    return " ".join(run(*options, code=code).stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--solver", "kfac", "--offload", "disk"), "--offload: is about rows of gradients, and the kfac solver holds"),
        (
            ("--solver", "ekfac", "--store", "x", "--store-dtype", "float16"),
            "--store-dtype: is about rows of gradients",
        ),
        (("--solver", "sketched", "--store-dtype", "float16"), "--store-dtype: is of a store: add --store PATH"),
        (("--shard-rows", 10), "--shard-rows: is of the files of a store or the tasks of workers: add --store PATH or"),
        (("--shard-rows", 0), "'--shard-rows'"),
        (("--offload", "gpu"), "'gpu' is not one of 'none', 'cpu', 'disk'"),
        (("--memory", "lots"), "--memory: memory must be a number of bytes or a text such as \"8GB\", not 'lots'"),
        (("--memory", "0"), "--memory: must be positive, not '0'"),
        (
            ("--solver", "sketched", "--store", "foo://x"),
            "--store: the store foo://x has the scheme 'foo', which fsspec",
        ),
        (("--solver", "sketched", "--store", __file__), "is a file: give a folder"),
        (("--fit", "kept", "--scheduler", "local"), "--scheduler: is decided by the fit of --fit: leave it out"),
        (("--fit", "kept", "--store", "x"), "--store: is decided by the fit of --fit: leave it out"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_trained(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(Source, "load", lambda *_, **__: pytest.fail("loaded"))
    assert message in refusal("attribute", *DIGITS, "--out", tmp_path / "results", *options)


def test_an_option_that_no_method_takes(tmp_path):
    methods = ("--methods", "ggn:kfac,ggn:ekfac", "--offload", "cpu")
    assert "--offload: is about rows of" in refusal("evaluate", *DIGITS, *methods, "--out", tmp_path / "results")


def test_a_store_of_other_gradients_is_one_line(tmp_path):
    options = ("attribute", *DIGITS, *SKETCHED, "--store", tmp_path / "x", "--no-report")
    run(*options, "--out", tmp_path / "one")
    said = refusal(*options, "--sketch-size", 64, "--out", tmp_path / "two", code=1)
    assert "another sketch: m: 128 there, 64 here. Give another store" in said


def test_no_scheduler_at_the_address(tmp_path, monkeypatch):
    monkeypatch.setattr("refluence.distributed.clients.SECONDS_TO_CONNECT", 0.2)
    monkeypatch.setattr(Source, "load", lambda *_, **__: pytest.fail("loaded"))
    said = refusal("attribute", *DIGITS, "--out", tmp_path / "results", "--scheduler", "tcp://127.0.0.1:9")
    assert "--scheduler: no Dask scheduler answers at 'tcp://127.0.0.1:9'" in said
    assert "start one (`dask scheduler`)" in said


@pytest.mark.parametrize("scheduler", ["local", "tcp://127.0.0.1:9"])
def test_a_scheduler_without_dask(tmp_path, monkeypatch, scheduler):
    monkeypatch.setitem(sys.modules, "distributed", None)
    said = refusal("attribute", *DIGITS, "--out", tmp_path / "results", "--scheduler", scheduler)
    assert "--scheduler: a cluster needs Dask: pip install 'refluence[distributed]'" in said


def test_a_module_that_workers_lack(file, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ModuleNotFoundError("No module named 'mine'", name="mine")

    monkeypatch.setattr(rf.Influence, "fit", fails)
    options = ("attribute", "--task", f"{file}:data", "--solver", "gram", "--out", tmp_path / "results")
    said = refusal(*options, "--scheduler", "local")
    assert "the workers of local have no module 'mine': install it there, or give --task as path/to/file.py" in said
    with pytest.raises(ModuleNotFoundError):
        run(*options)


# ------------------------------------------------------------------ plan and doctor


def test_a_plan_counts_on_rows_that_are_held_elsewhere(monkeypatch):
    sizes = []
    for offload in ("none", "disk"):
        printed = run("plan", *DIGITS[:6], "--solver", "sketched", "--sketch-size", 2048, "--offload", offload).stdout
        sizes.append(next(line for line in printed.splitlines() if line.startswith("memory")))
    assert sizes[0] != sizes[1]


def test_doctor_says_whether_there_is_dask(monkeypatch):
    lines = run("doctor").stdout.splitlines()
    said = next(line for line in lines if line.startswith("dask"))
    assert metadata.version("dask") in said
    version = metadata.version

    def without(name):
        if name == "dask":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    assert "--scheduler needs it: pip install 'refluence[distributed]'" in " ".join(run("doctor").stdout.split())


def test_the_options_are_in_the_help():
    for command in ("attribute", "evaluate"):
        printed = run(command, "--help").stdout
        for option in ("--store", "--offload", "--store-dtype", "--shard-rows", "--scheduler"):
            assert option in printed
