"""A bad example is named; a fit that leaves bad examples out is the dense one with weight 0 for them."""

import pickle
import warnings

import cloudpickle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

import refluence as rf
from refluence.batches import Batches
from refluence.errors import BadExampleError, DataError, NonFiniteError, TaskError
from refluence.skipping import bad_rows
from refluence.solvers.projection import curvature_sketches
from support.poisoned import (
    BATCH,
    HOLDERS,
    IN_EVERY_BATCH,
    KINDS,
    REASONS,
    UNKNOWN,
    Files,
    K,
    N,
    Reference,
    Words,
    clean,
    files,
    poisoned,
    task,
)
from support.problems import close, damped

TEST = clean(K, seed=2)
SOLVERS = {
    "gram": ("fisher", rf.solvers.Gram(), 0.05),
    "dense": ("fisher", rf.solvers.Dense(), 0.05),
    "gram on the ggn": ("ggn", rf.solvers.Gram(), 0.05),
    "conjugate gradients": ("hessian", rf.solvers.ConjugateGradient(rtol=1e-12), 8.0),
    "conjugate gradients on the ggn": ("ggn", rf.solvers.ConjugateGradient(rtol=1e-12), 0.05),
}
FIXED = {"gradient", "loss"}


def fitted(train, curvature="fisher", solver=None, damping=0.05, weights=None, skip=True, own=None, **execution):
    influence = rf.Influence(
        own or task(),
        curvature=curvature,
        solver=solver or rf.solvers.Gram(),
        damping=damping,
        batch_size=BATCH,
        progress=False,
        execution=rf.Execution(skip_bad=skip, **execution),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* left out")
        return influence.fit(train, weights=weights)


def named(found, bad):
    """Each bad row, and no other, with its reason."""
    assert found.keys() == bad.keys()
    for row, kind in bad.items():
        assert found[row].startswith(REASONS[kind])


# ------------------------------------------------------------------ the dense reference


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_fit_without_the_bad_rows_is_the_dense_one_in_which_they_have_weight_zero(solver, weighted):
    curvature, own, damping = SOLVERS[solver]
    weights = torch.linspace(0, 2, N, dtype=torch.float64) if weighted else None
    reference = Reference(IN_EVERY_BATCH, weights)
    influence = fitted(poisoned(IN_EVERY_BATCH), curvature, own, damping, weights)
    named(influence.skipped, IN_EVERY_BATCH)
    C = reference.curvature(curvature)
    inverse = torch.linalg.inv(damped(C, damping))
    close(influence.score(TEST).values, reference.scores(inverse))
    close(influence.self_influence(), reference.self_influence(inverse))
    close(influence.inverse_hvp(TEST), reference.V @ inverse)
    total = (reference.dense.gradients * reference.w[:, None]).sum(dim=0) / N
    assert influence.gradient_norm == pytest.approx(float(total.norm()))


@pytest.mark.parametrize("store", [False, True])
def test_a_sketch_without_the_bad_rows(tmp_path, store):
    execution = {"store": tmp_path / "store", "shard_rows": 8} if store else {}
    solver = rf.solvers.Sketched(rf.sketches.SJLT(12, seed=5), corrected=False)
    influence = fitted(poisoned(IN_EVERY_BATCH), solver=solver, **execution)
    named(influence.skipped, IN_EVERY_BATCH)
    reference, curvature = Reference(IN_EVERY_BATCH), influence._fit.curvature
    P = curvature_sketches(solver.sketch, curvature)["full"].matrix(reference.V.shape[1])
    inverse = P.T @ torch.linalg.inv(damped(P @ reference.curvature("fisher") @ P.T, 0.05)) @ P
    close(influence.score(TEST).values, reference.scores(inverse), rtol=1e-7)
    close(influence.self_influence(), reference.self_influence(inverse), rtol=1e-7)


def test_kfac_without_the_bad_rows():
    """Of one linear layer: E ⊗ A of the good rows, E their mean over all rows and A over the good ones."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    x, y = poisoned({1: "loss", 22: "loss"})
    influence = fitted((x, y), solver=rf.solvers.Kfac(), own=rf.Task(model))
    good = [row for row in range(N) if row not in (1, 22)]

    def slopes(data):
        x, y = data
        return (x @ model.weight.detach().T).softmax(dim=1) - torch.nn.functional.one_hot(y, 3)

    a, e = x[good], slopes((x[good], y[good]))
    E, A = e.T @ e / N, a.T @ a / len(good)
    inverse = torch.linalg.inv(damped(torch.kron(E, A), 0.05))
    G, V = (torch.einsum("nc,nd->ncd", slopes(d), d[0]).flatten(1) for d in ((a, y[good]), TEST))
    expected = torch.zeros(K, N, dtype=torch.float64)
    expected[:, good] = V @ inverse @ G.T
    close(influence.score(TEST).values, expected)


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.integers(0, N - 1), st.sampled_from(KINDS), min_size=1, max_size=12))
def test_whichever_rows_are_bad_in_whichever_way(bad):
    influence = fitted(files(bad))
    named(influence.skipped, bad)
    reference = Reference(bad)
    close(influence.score(TEST).values, reference.scores(torch.linalg.inv(damped(reference.curvature("fisher"), 0.05))))


# ------------------------------------------------------------------ data sets and loaders


@pytest.mark.parametrize("holder", HOLDERS)
def test_every_holder_of_the_data(holder):
    bad = IN_EVERY_BATCH if holder in ("tensors", "mapping") else IN_EVERY_BATCH | {3: "reading", 21: "reading"}
    options = {}
    if holder == "mapping":
        options = {"forward": lambda model, batch: model(batch["inputs"])}
    train = HOLDERS[holder](bad)
    test = TEST if holder != "mapping" else dict(zip(("inputs", "labels"), TEST, strict=True))
    influence = fitted(train, own=task(**options))
    named(influence.skipped, bad)
    reference = Reference(bad)
    inverse = torch.linalg.inv(damped(reference.curvature("fisher"), 0.05))
    close(influence.score(test).values, reference.scores(inverse))


def test_a_loader_with_workers():
    bad = {2: "reading", 7: "loss", 16: "reading"}
    influence = fitted(DataLoader(files(bad), batch_size=6, num_workers=1))
    named(influence.skipped, bad)


def test_good_data_are_not_searched(monkeypatch):
    monkeypatch.setattr("refluence.fitting.bad_rows", None)
    for curvature, solver in (("fisher", rf.solvers.Gram()), ("ggn", rf.solvers.Kfac())):
        influence = rf.Influence(task(), curvature=curvature, solver=solver, damping=0.1, progress=False)
        assert influence.fit(clean()).skipped == {}
    assert fitted(clean()).skipped == {}


def test_a_solver_that_fits_without_gradients_looks_for_bad_rows_all_the_same():
    for solver in (rf.solvers.ConjugateGradient(), rf.solvers.Identity()):
        assert fitted(clean(), solver=solver).skipped == {}
        named(fitted(poisoned({17: "gradient"}), solver=solver).skipped, {17: "gradient"})


def test_a_search_costs_one_pass_of_good_batches_and_halves_bad_ones():
    class Counting(Words):
        passes = 0

        def forward(self, x):
            self.passes += 1
            return super().forward(x)

    model = Counting()
    x, y = (torch.cat([part] * 16) for part in clean(16))
    x[100] = torch.nan
    assert bad_rows(rf.Task(model), model, Batches((x, y), 64), progress=False) == {100: "the loss is nan"}
    # Four batches, one of them again and its halves down to single rows.
    assert model.passes == 4 + 1 + 2 * 6


def test_a_stretch_of_a_data_set_has_its_own_bad_rows():
    x, y = poisoned({5: "loss", 13: "model"})
    part = Batches((x, y), BATCH, name="train").stretch(8, 16)
    found = bad_rows(task(), Words(), part, progress=False)
    assert found.keys() == {5}
    assert found[5].startswith(REASONS["model"])


def test_the_model_is_as_before_a_search():
    model = Words().train()
    model.head.weight.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train = Batches(poisoned(IN_EVERY_BATCH), BATCH)
    named(bad_rows(rf.Task(model), model, train, progress=False), IN_EVERY_BATCH)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# ------------------------------------------------------------------ what is said


@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
@pytest.mark.parametrize("row", [0, 2, 13, 22])
@pytest.mark.parametrize("kind", KINDS)
def test_without_skipping_the_first_bad_row_stops_the_fit_and_is_named(kind, row, curvature):
    solver = {"fisher": rf.solvers.Gram(), "hessian": rf.solvers.Dense()}[curvature]
    train = files({row: kind, N - 1: kind})
    with pytest.raises(BadExampleError, match=rf"train row {row}\b") as raised:
        fitted(train, curvature, solver, 8.0, skip=False)
    error = raised.value
    assert isinstance(error, NonFiniteError) == (kind in FIXED)
    assert error.row == row
    assert error.reason.startswith(REASONS[kind])
    assert (error.__cause__ is None) == (kind in FIXED)
    assert "leave it out" in str(error)


def test_a_product_of_the_hessian_names_the_row_where_the_fit_made_no_gradient():
    x, y = clean(60)
    influence = fitted((x, y), "hessian", rf.solvers.ConjugateGradient(), 8.0, skip=False)
    x[50] = 0
    with pytest.raises(
        NonFiniteError, match=r"train row 50 is bad: the gradient with respect to layer\.weight"
    ) as raised:
        influence.inverse_hvp(TEST)
    assert raised.value.row == 50


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", [pickle, cloudpickle])
def test_the_error_survives_pickling(kind, library):
    with pytest.raises(BadExampleError) as raised:
        fitted(files({9: kind}), skip=False)
    raised.value.add_note("on a worker")
    again = library.loads(library.dumps(raised.value))
    assert type(again) is type(raised.value)
    assert (str(again), again.row, again.reason) == (str(raised.value), 9, raised.value.reason)
    assert again.__notes__ == raised.value.__notes__


def test_a_warning_says_how_many_rows_are_left_out_and_why():
    influence = rf.Influence(
        task(), solver=rf.solvers.Gram(), damping=0.1, progress=False, execution=rf.Execution(skip_bad=True)
    )
    expected = (
        r"5 of 23 training examples are left out: row 2 \(the loss is nan\), row 3 \(the loss is nan\), "
        r"row 8 \(the model or the loss raises LookupError: no such word\) and 2 more$"
    )
    with pytest.warns(UserWarning, match=expected):
        influence.fit(poisoned({2: "loss", 3: "loss", 8: "model", 9: "loss", 20: "loss"}))
    with pytest.warns(UserWarning, match="1 of 23 training example is left out: row 4"):
        influence.fit(poisoned({4: "loss"}))


def test_the_manifest_of_fit_and_scores_has_the_rows():
    influence = fitted(poisoned({3: "loss", 5: "gradient"}))
    expected = {"3": REASONS["loss"], "5": REASONS["gradient"]}
    assert influence.manifest()["skipped_rows"] == expected
    assert influence.score(TEST).manifest["skipped_rows"] == expected
    assert fitted(clean()).manifest()["skipped_rows"] == {}


# ------------------------------------------------------------------ what is no row's fault


def test_data_of_bad_rows_only():
    with pytest.raises(
        DataError, match=r"all 23 examples of the train are bad.*row 0 \(the loss is nan\), .* and 20 more"
    ):
        fitted(poisoned(dict.fromkeys(range(N), "loss")))


@pytest.mark.parametrize("skip", [True, False])
def test_an_error_on_every_row_is_raised_as_it_is(skip):
    with pytest.raises(LookupError, match="no such word"):
        fitted(poisoned(dict.fromkeys(range(N), "model")), skip=skip)
    with pytest.raises(FileNotFoundError, match="no file"):
        fitted(files(dict.fromkeys(range(N), "reading")), skip=skip)

    def wrong(output, batch):
        raise TypeError("this loss takes other arguments")

    def mean_of_batch(output, batch):
        return nn.functional.cross_entropy(output, batch[1])

    with pytest.raises(TypeError, match="other arguments"):
        fitted(clean(), own=task(loss=wrong), skip=skip)
    with pytest.raises(TaskError, match="one value per example"):
        fitted(poisoned({3: "loss"}), own=task(loss=mean_of_batch), skip=skip)


def test_a_first_batch_of_bad_rows_only_is_left_out():
    bad = dict.fromkeys(range(BATCH + 1), "model")
    named(fitted(poisoned(bad)).skipped, bad)


@pytest.mark.parametrize("skip", [True, False])
def test_an_error_that_does_not_come_again_is_raised_as_it_is(skip):
    class Once(Words):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 12:
                raise OSError("a connection was lost")
            return super().forward(x)

    with pytest.raises(OSError, match="connection was lost"):
        fitted(clean(), own=rf.Task(Once()), skip=skip)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_memory_and_interrupts_are_no_fault_of_an_example(error):
    class Large(Words):
        def forward(self, x):
            if bool((x == UNKNOWN).any()):
                raise error
            return super().forward(x)

    with pytest.raises(error):
        fitted(poisoned({9: "model"}), own=rf.Task(Large()))


@pytest.mark.parametrize("row", [1, 37])
def test_bad_test_rows_are_an_error_that_names_them(row):
    influence, tests = fitted(clean()), clean(40)
    with pytest.raises(NonFiniteError, match=rf"test row {row}\b"):
        influence.score(poisoned({row: "loss"}, tests))
    for kind, holder, error, expected in (
        ("model", poisoned, LookupError, "raised by the model or the loss on test row"),
        ("reading", Files, FileNotFoundError, "raised by reading test row"),
    ):
        bad = {row: kind, row + 1: kind}
        data = holder(tests, set(bad)) if holder is Files else holder(bad, tests)
        with pytest.raises(error) as raised:
            influence.score(data)
        assert any(note.startswith(f"{expected} {row}") for note in raised.value.__notes__)


def test_a_train_row_that_a_fit_without_gradients_did_not_read_is_named_by_the_scores():
    rows = Files(clean(60), set())
    influence = fitted(rows, solver=rf.solvers.Identity(), skip=False)
    rows.missing = {50}
    with pytest.raises(FileNotFoundError) as raised:
        influence.score(TEST)
    assert "raised by reading train row 50" in raised.value.__notes__


# ------------------------------------------------------------------ what else a fit does


def test_a_plan_of_data_whose_first_rows_are_bad():
    influence = rf.Influence(task(), solver=rf.solvers.Gram(), progress=False, execution=rf.Execution(skip_bad=True))
    assert influence.plan_for(poisoned({0: "model", 1: "loss"})).workload.n == N


def test_a_saved_fit_has_the_rows_and_the_same_numbers(tmp_path):
    bad = IN_EVERY_BATCH | {3: "reading"}
    influence = fitted(files(bad), weights=torch.linspace(0, 2, N))
    influence.save(tmp_path / "fit")
    again = rf.Influence.load(tmp_path / "fit", task())
    named(again.skipped, bad)
    assert again.manifest()["skipped_rows"] == influence.manifest()["skipped_rows"]
    assert torch.equal(again.score(TEST).values, influence.score(TEST).values)
    assert torch.equal(again.self_influence(), influence.self_influence())


def test_the_same_fit_at_another_damping_leaves_out_the_same_rows():
    influence = fitted(poisoned(IN_EVERY_BATCH))
    other = influence.at(0.7)
    named(other.skipped, IN_EVERY_BATCH)
    reference = Reference(IN_EVERY_BATCH)
    close(other.score(TEST).values, reference.scores(torch.linalg.inv(damped(reference.curvature("fisher"), 0.7))))


def test_groups_norms_and_perturbations_take_nothing_from_a_bad_row():
    bad = {1: "loss", 7: "loss", 22: "gradient"}
    influence, plain = fitted(poisoned(bad)), fitted(clean(), weights=[float(row not in bad) for row in range(N)])
    rows = torch.tensor([row for row in range(N) if row not in bad])
    labels = [row % 3 for row in range(N)]
    close(influence.score(TEST, groups=labels).values, plain.score(TEST, groups=labels).values.double())
    for normalize in ("theta-relatif", "l-relatif"):
        found, expected = (one.score(TEST, normalize=normalize).values for one in (influence, plain))
        close(found, expected.double())
        assert not found[:, list(bad)].any()
    found = influence.perturbation(TEST)
    assert not found[:, list(bad)].any()
    close(found[:, rows], plain.perturbation(TEST)[:, rows])
