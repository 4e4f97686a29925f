"""A saved fit gives the same numbers in another process, and refuses what it was not made of."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import refluence as rf
from refluence.errors import DataError, RefluenceError
from refluence.persistence import FORMAT
from refluence.records import from_record, to_record
from refluence.solvers import preconditioners

CURVATURES = ("fisher", "ggn", "hessian", "true_fisher", "mc_fisher")
ARGUMENTS = {
    "Arnoldi": {"rank": 6},
    "Nystroem": {"rank": 6},
    "Sketched": {"sketch": rf.sketches.SJLT(16, seed=3)},
    "ConjugateGradient": {"preconditioner": preconditioners.Nystroem(5, seed=2), "rtol": 1e-4},
}
SOLVERS = {
    name: kind(**ARGUMENTS.get(name, {}))
    for name, kind in ((name, getattr(rf.solvers, name)) for name in rf.solvers.__all__)
    if isinstance(kind, type) and hasattr(kind, "prepare") and dataclasses.is_dataclass(kind)
}
# each curvature by its exact solver, and every solver on a curvature with rows that are not the training gradients
PAIRS = [
    *(("Dense", curvature) for curvature in CURVATURES),
    *((solver, "mc_fisher" if solver == "HarmonicMean" else "ggn") for solver in SOLVERS if solver != "Dense"),
]
N, K = 23, 4

PROBLEM = f"""
    import torch
    import torch.nn.functional as F
    from torch import nn
    import refluence as rf

    def per_example(output, batch):
        return F.cross_entropy(output, batch[1], reduction="none")

    def halved(model, batch):
        return model(0.5 * batch[0])

    def other(model, batch):
        return model(batch[0])

    def network():
        generator = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return model

    def task(custom=False, **options):
        given = dict(loss=per_example, forward=halved) if custom else {{}}
        return rf.Task(network(), **{{"l2": 0.01, **given, **options}})

    def rows(n, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        return x, torch.randint(3, (n,), generator=generator)

    TRAIN, TEST = rows({N}, 1), rows({K}, 2)

    def answers(influence):
        scores = influence.score(TEST)
        found = dict(values=scores.values, own=influence.self_influence(), hvp=influence.inverse_hvp(TEST))
        if scores.error is not None:
            found["error"] = scores.error
        return found, dict(damping=influence.damping, manifest=influence.manifest(), exact=influence.exact)
"""
SCRIPT = """
    import json, sys, warnings
    from pathlib import Path
    import torch
    import problem
    import refluence as rf

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for path in sorted(Path("fits").iterdir()):
        influence = rf.Influence.load(path, problem.task(custom="custom" in path.name))
        tensors, facts = problem.answers(influence)
        torch.save(tensors, Path("found") / f"{path.name}.pt")
        (Path("found") / f"{path.name}.json").write_text(json.dumps(facts))
"""
BLOCKED = {"blocks": "module", "damping": {"0": 0.05, "2": rf.RelativeDamping(0.3)}}
VARIANTS = {
    "weights": ("Gram", "fisher", {"weights": torch.linspace(0, 2, N)}),
    "weights of a ggn": ("Gram", "ggn", {"weights": torch.linspace(0, 2, N)}),
    "blocks": ("Dense", "ggn", BLOCKED),
    "blocks of a sketch": ("Sketched", "fisher", BLOCKED),
    "blocks of an iteration": ("ConjugateGradient", "ggn", {**BLOCKED, "weights": torch.linspace(0.5, 2, N)}),
    "samples": ("Gram", "mc_fisher", {"samples": 4, "seed": 7}),
    "device and dtype": ("Gram", "fisher", {"device": "cpu", "dtype": torch.float32}),
    "damping by dimension": ("Gram", "fisher", {"damping": rf.EffectiveDimension(3)}),
    "custom": ("Gram", "ggn", {}),
    "custom hessian": ("Dense", "hessian", {}),
    "automatic": ("auto", "fisher", {"damping": "auto"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("persistence")
    for name, text in (("problem.py", PROBLEM), ("script.py", SCRIPT)):
        (folder / name).write_text(textwrap.dedent(text))
    (folder / "found").mkdir()
    return folder


@pytest.fixture(scope="module")
def problem(folder):
    spec = importlib.util.spec_from_file_location("problem", folder / "problem.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Samples(Dataset):
    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, row):
        return self.samples[row]


def fitted(problem, solver, curvature, custom=False, **options):
    weights = options.pop("weights", None)
    options = {"damping": 0.3, "batch_size": 5, "progress": False, **options}
    solver = SOLVERS.get(solver, solver)
    influence = rf.Influence(problem.task(custom=custom), curvature=curvature, solver=solver, **options)
    return influence.fit(problem.TRAIN, weights=weights)


@pytest.fixture(scope="module")
def both(folder, problem):
    """Name of a fit → (what it answered before it was saved, what another process answers)."""
    before = {}
    wanted = {f"{solver} {c}": (solver, c, {}) for solver, c in PAIRS} | VARIANTS
    for name, (solver, curvature, options) in wanted.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of indefinite curvature
            influence = fitted(problem, solver, curvature, custom="custom" in name, **options)
            before[name] = problem.answers(influence)
        assert influence.save(folder / "fits" / name) == folder / "fits" / name
    subprocess.run([sys.executable, "script.py"], cwd=folder, check=True)

    def found(name):
        tensors = torch.load(folder / "found" / f"{name}.pt", weights_only=True)
        return tensors, json.loads((folder / "found" / f"{name}.json").read_text())

    return {name: (answers, found(name)) for name, answers in before.items()}


def check(expected, found):
    (tensors, facts), (other_tensors, other_facts) = expected, found
    assert set(tensors) == set(other_tensors)
    for name, values in tensors.items():
        torch.testing.assert_close(other_tensors[name], values, rtol=1e-12, atol=1e-14, msg=name)
    assert other_facts == json.loads(json.dumps(facts))


@pytest.mark.parametrize(("solver", "curvature"), PAIRS)
def test_another_process_gives_the_same_numbers(both, solver, curvature):
    check(*both[f"{solver} {curvature}"])


@pytest.mark.parametrize("name", VARIANTS)
def test_another_process_gives_the_same_numbers_with(both, name):
    check(*both[name])
    assert ("error" in both[name][0][0]) == (name in ("samples", "blocks of a sketch"))


@pytest.mark.parametrize("name", ["blocks", "weights of a ggn", "automatic"])
def test_a_loaded_fit_is_the_fit(both, folder, problem, name):
    solver, curvature, options = VARIANTS[name]
    before = fitted(problem, solver, curvature, **options)
    after = rf.Influence.load(folder / "fits" / name, problem.task())
    assert after.settings.solver == before.settings.solver
    assert after.plan.chosen.solver == before.plan.chosen.solver
    assert after.plan.reason == before.plan.reason
    assert after.settings.batch_size == 5
    assert after.groups == before.groups
    torch.testing.assert_close(after.at(0.7).score(problem.TEST).values, before.at(0.7).score(problem.TEST).values)
    torch.testing.assert_close(after.perturbation(problem.TEST), before.perturbation(problem.TEST))
    assert after.gradient_norm == pytest.approx(before.gradient_norm, rel=1e-12)


def test_the_measurement_may_be_another_one(both, folder, problem):
    before = rf.Influence(problem.task(measurement="margin"), "ggn", damping=0.05, progress=False)
    before = before.fit(problem.TRAIN)
    influence = rf.Influence.load(folder / "fits" / "Gram ggn", problem.task(measurement="margin"))
    torch.testing.assert_close(influence.at(0.05).score(problem.TEST).values, before.score(problem.TEST).values)


def test_a_fit_at_another_damping_is_saved_with_that_damping(folder, problem, tmp_path):
    influence = fitted(problem, "Gram", "fisher").at(rf.RelativeDamping(0.7))
    path = influence.save(tmp_path / "fit")
    assert rf.Influence.load(path, problem.task()).damping == influence.damping


@pytest.mark.parametrize(
    "data",
    [
        lambda x, y: DataLoader(TensorDataset(x, y), batch_size=6),
        lambda x, y: TensorDataset(x, y),
        lambda x, y: Samples(list(zip(x, y, strict=True))),
        lambda x, y: {"input": x, "labels": y},
        lambda x, y: ({"input": x}, y),
    ],
    ids=["loader", "data set", "samples", "mapping", "nested"],
)
def test_any_kind_of_data_is_stored(problem, tmp_path, data):
    def forward(model, batch):
        while not isinstance(batch, torch.Tensor):
            batch = batch["input"] if isinstance(batch, dict) else batch[0]
        return model(batch)

    task = rf.Task(problem.network(), forward=forward)
    influence = rf.Influence(task, damping=0.1, progress=False).fit(data(*problem.TRAIN))
    loaded = rf.Influence.load(influence.save(tmp_path / "fit"), task)
    test = data(*problem.TEST)
    assert torch.equal(loaded.score(test).values, influence.score(test).values)
    groups = (influence.score(test, groups="class").values, loaded.score(test, groups="class").values)
    assert torch.equal(*groups)


@pytest.fixture
def saved(problem, tmp_path):
    return fitted(problem, "Gram", "fisher").save(tmp_path / "fit")


def test_a_fit_is_replaced_and_nothing_is_left_beside_it(problem, saved):
    assert fitted(problem, "Dense", "ggn").save(saved) == saved
    assert rf.Influence.load(saved, problem.task()).curvature == "ggn"
    assert [path.name for path in saved.parent.iterdir()] == ["fit"]
    assert {path.name for path in saved.iterdir()} == {"fit.json", "state.safetensors", "train.pt"}


def test_a_save_that_fails_leaves_the_fit_that_was_there(problem, saved, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    before = (saved / "fit.json").read_text()
    influence = fitted(problem, "Dense", "ggn")
    monkeypatch.setattr("refluence.persistence.torch.save", fail)
    with pytest.raises(OSError, match="disk full"):
        influence.save(saved)
    assert (saved / "fit.json").read_text() == before
    assert [path.name for path in saved.parent.iterdir()] == ["fit"]


def test_a_folder_of_something_else_is_not_touched(problem, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="holds no fit: choose another path"):
        fitted(problem, "Gram", "fisher").save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(DataError, match=r"holds no fit: it should be a folder that Influence\.save wrote"):
        rf.Influence.load(tmp_path, problem.task())


def test_another_format_is_refused(problem, saved):
    record = json.loads((saved / "fit.json").read_text())
    (saved / "fit.json").write_text(json.dumps({**record, "format": "refluence-fit-99"}))
    with pytest.raises(DataError, match=f"'refluence-fit-99', this version of refluence reads '{FORMAT}'"):
        rf.Influence.load(saved, problem.task())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"l2": 0.02}, "l2 is 0.02, but the fit was made with 0.01"),
        ({"loss": "mse"}, "loss is 'mse', but the fit was made with 'cross_entropy'"),
        ({"parameters": "0.*"}, r"parameters differ .*: '2\.bias' is only in the fit's"),
    ],
)
def test_another_task_is_refused_with_the_first_difference(problem, saved, options, words):
    with pytest.raises(RefluenceError, match=words):
        rf.Influence.load(saved, problem.task(**options))


def test_another_forward_is_refused(problem, saved):
    with pytest.raises(RefluenceError, match="the task's forward is 'other:"):
        rf.Influence.load(saved, problem.task(forward=problem.other))


def test_another_model_is_refused(problem, saved):
    task = problem.task()
    with torch.no_grad():
        task.model[0].bias[0] += 1e-9
    with pytest.raises(RefluenceError, match="the model is not the one of the fit"):
        rf.Influence.load(saved, task)
    with pytest.raises(RefluenceError, match="the task's model is 'Linear'"):
        rf.Influence.load(saved, rf.Task(nn.Linear(3, 3)))


def test_a_model_that_changed_since_the_fit_cannot_be_saved(problem, tmp_path):
    influence = fitted(problem, "Gram", "fisher")
    with torch.no_grad():
        influence.task.model[0].bias += 1.0
    with pytest.raises(RefluenceError, match="changed since fit"):
        influence.save(tmp_path / "fit")
    assert not (tmp_path / "fit").exists()


@pytest.mark.parametrize("name", ["state.safetensors", "train.pt"])
def test_a_damaged_file_is_named(problem, saved, name):
    (saved / name).write_bytes((saved / name).read_bytes()[:40])
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        rf.Influence.load(saved, problem.task())


def test_other_training_data_is_refused(problem, saved):
    train = torch.load(saved / "train.pt", weights_only=True)
    train["data"][0][0, 0] += 1
    torch.save(train, saved / "train.pt")
    with pytest.raises(DataError, match="holds other rows than the fit was made with"):
        rf.Influence.load(saved, problem.task())


def test_a_device_that_is_not_here_is_replaced_with_a_warning(problem, saved):
    record = json.loads((saved / "fit.json").read_text())
    (saved / "fit.json").write_text(json.dumps({**record, "device": "cuda:99"}))
    with pytest.warns(UserWarning, match="'cuda:99', which is not here"):
        rf.Influence.load(saved, problem.task())


def test_nothing_is_pickled_that_is_no_tensor(problem, tmp_path):
    named = [{"x": x, "labels": y, "name": f"row {i}"} for i, (x, y) in enumerate(zip(*problem.TRAIN, strict=True))]
    task = rf.Task(problem.network(), forward=lambda model, batch: model(batch["x"]))
    influence = rf.Influence(task, damping=0.1, progress=False, batch_size=4).fit(Samples(named))
    with pytest.raises(DataError, match="hold a list that cannot be written without pickling"):
        influence.save(tmp_path / "fit")
    assert not list(tmp_path.iterdir())


def test_batches_of_different_lengths_are_refused(tmp_path):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)

        def forward(self, x):
            return self.head(x).mean(1)

    def collate(samples):
        length = max(len(x) for x, _ in samples)
        padded = [torch.cat([x, torch.zeros(length - len(x), 2)]) for x, _ in samples]
        return torch.stack(padded), torch.tensor([y for _, y in samples])

    samples = [(torch.ones(1 + i // 2, 2), i % 2) for i in range(6)]
    loader = DataLoader(Samples(samples), batch_size=2, collate_fn=collate)
    influence = rf.Influence(rf.Task(Mean()), damping=0.1, progress=False).fit(loader)
    with pytest.raises(DataError, match="pad the rows to one length"):
        influence.save(tmp_path / "fit")


@pytest.mark.parametrize(
    "value",
    [
        *SOLVERS.values(),
        rf.solvers.ConjugateGradient(preconditioner=rf.solvers.Ekfac(update_eigenvalues=False)),
        rf.solvers.ConjugateGradient(rtol=1e-3, preconditioner=preconditioners.Jacobi(probes=4)),
        rf.solvers.Sketched(rf.sketches.Rademacher(9, seed=5), corrected=False),
        rf.solvers.Sketched(rf.sketches.Kronecker(3, 4, seed=5, orthogonal=False), replicates=2),
        rf.solvers.Sketched(rf.sketches.TensorSketch(9, seed=5)),
        {"a": 0.5, "b": rf.EffectiveDimension(2), "type": "auto"},
        "auto",
        (1, None, 2.5, True),
    ],
    ids=str,
)
def test_a_record_gives_the_configuration_back(value):
    assert from_record(json.loads(json.dumps(to_record(value)))) == value


def test_a_record_makes_nothing_but_configurations_of_the_library():
    @dataclasses.dataclass(frozen=True)
    class Own:
        rank: int = 3

    with pytest.raises(DataError, match="Own cannot be written"):
        to_record(Own())
    for name in ("os.system", "solvers.Solver", "persistence.save", "Own"):
        with pytest.raises(DataError, match="does not have"):
            from_record({"type": name})
    with pytest.raises(DataError, match=r"solvers\.Gram has other fields"):
        from_record({"type": "solvers.Gram", "rank": 3})
