"""`Influence` as its users call it: what each answer means, and every mistake with its remedy."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import refluence as rf
from refluence.errors import (
    DataError,
    NonDeterministicError,
    NonFiniteError,
    NotFittedError,
    PlanError,
    RefluenceError,
    TaskError,
)
from support.reference import bilinear, curvature, loop_gradients, scores

N, K, LAMBDA = 20, 6, 0.02
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


def network(seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def rows(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator, dtype=torch.float64), torch.randint(3, (n,), generator=generator)


def per_example(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def train():
    return rows(N, 1)


@pytest.fixture(scope="module")
def test():
    return rows(K, 2)


@pytest.fixture(scope="module")
def G(model, train):
    return loop_gradients(model, per_example, NAMES, train)


@pytest.fixture(scope="module")
def V(model, test):
    return loop_gradients(model, per_example, NAMES, test)


@pytest.fixture(scope="module")
def influence(model, train):
    return fit(model, train)


def fit(model, train, weights=None, task=None, **options):
    options = {"solver": rf.solvers.Gram(), "damping": LAMBDA, "batch_size": 7, **options}
    return rf.Influence(task or rf.Task(model), **options).fit(train, weights=weights)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))


# ---------------------------------------------------------------- options of score


def test_the_predicted_change_of_a_removal_is_the_score_over_n(influence, test, G, V):
    assert_equal(influence.score(test).predicted_loo_change, scores(V, G, LAMBDA) / N)


def test_theta_relatif_divides_by_the_length_of_the_parameter_change(influence, test, G, V):
    step = torch.linalg.solve(curvature(G) + LAMBDA * torch.eye(31, dtype=torch.float64), G.T)
    expected = scores(V, G, LAMBDA) / step.norm(dim=0)
    assert_equal(influence.score(test, normalize="theta-relatif").values, expected)


def test_l_relatif_divides_by_the_root_of_the_self_influence(influence, test, G, V):
    own = bilinear(G, G, curvature(G), LAMBDA).diagonal()
    assert_equal(influence.score(test, normalize="l-relatif").values, scores(V, G, LAMBDA) / own.sqrt())


@pytest.mark.parametrize("solver", [rf.solvers.Gram(), rf.solvers.Dense(), rf.solvers.Identity()], ids=repr)
@pytest.mark.parametrize("normalize", ["theta-relatif", "l-relatif"])
def test_normalised_scores_do_not_see_the_size_of_a_weight(model, train, test, G, V, solver, normalize):
    """The formulas hold for w_j g_j, so column j is the same whatever w_j > 0, and 0 for w_j = 0."""
    w = torch.linspace(0, 2, N, dtype=torch.float64)
    C = torch.eye(31, dtype=torch.float64) - LAMBDA * torch.eye(31, dtype=torch.float64)
    C = C if isinstance(solver, rf.solvers.Identity) else curvature(G, w)
    step = torch.linalg.solve(C + LAMBDA * torch.eye(31, dtype=torch.float64), (w[:, None] * G).T)
    length = step.norm(dim=0) if normalize == "theta-relatif" else (w[:, None] * G * step.T).sum(dim=1).sqrt()
    expected = torch.where(w > 0, V @ step / length, 0)
    assert_equal(fit(model, train, weights=w, solver=solver).score(test, normalize=normalize).values, expected)


def test_weights_of_score_scale_the_columns_and_may_be_negative(influence, test, G, V):
    w = torch.linspace(-1, 2, N, dtype=torch.float64)
    assert_equal(influence.score(test, weights=w).values, scores(V, G, LAMBDA) * w)


def test_groups_sum_their_columns_in_sorted_order(influence, test, G, V):
    labels = ["b", "a", "ü", "b"] * 5
    found = influence.score(test, groups=labels)
    expected = scores(V, G, LAMBDA)
    assert found.train_ids.tolist() == ["a", "b", "ü"]
    columns = [expected[:, [label == name for label in labels]].sum(dim=1) for name in ("a", "b", "ü")]
    assert_equal(found.values, torch.stack(columns, dim=1))
    assert found.top(1)["train"].isin(["a", "b", "ü"]).all()


@pytest.mark.parametrize("labels", [torch.arange(N) % 4, np.arange(N) % 4, iter([i % 4 for i in range(N)])])
def test_groups_may_be_any_sequence_of_labels(influence, test, labels):
    assert influence.score(test, groups=labels).train_ids.tolist() == [0, 1, 2, 3]


def test_groups_by_class_are_those_of_the_targets(influence, train, test, G, V):
    found = influence.score(test, groups="class")
    expected = scores(V, G, LAMBDA)
    columns = [expected[:, train[1] == c].sum(dim=1) for c in range(3)]
    assert found.train_ids.tolist() == [0, 1, 2]
    assert_equal(found.values, torch.stack(columns, dim=1))
    assert found.n_train == N


def test_a_loader_a_data_set_and_tensors_give_the_same_scores(model, train, test, G, V):
    expected = scores(V, G, LAMBDA)
    for make in (TensorDataset, lambda *t: DataLoader(TensorDataset(*t), batch_size=3), lambda *t: t):
        assert_equal(fit(model, make(*train)).score(make(*test)).values, expected)


def test_the_default_choices_are_exact_for_a_small_problem(model, train, test, G, V):
    influence = rf.Influence(rf.Task(model)).fit(train)
    assert influence.exact
    assert_equal(influence.score(test).values, scores(V, G, influence.damping))
    assert influence.effective_dimension == pytest.approx(min(N, 31) / 16, rel=1e-6)


def test_a_model_of_ten_rows_of_sequences_has_one_gradient_a_sequence():
    """An example is a row of the data, also where it is a sequence of targets."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double()
    tokens = torch.randint(7, (10, 5), generator=generator)
    targets = torch.randint(7, (10, 5), generator=generator)
    targets[2:, 3:] = -100
    targets[4] = -100

    def loss(m, batch):
        flat = F.cross_entropy(m(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="none", ignore_index=-100)
        counts = (batch[1] != -100).sum(dim=1).clamp(min=1)
        return flat.reshape(batch[1].shape).sum(dim=1) / counts

    G = loop_gradients(model, loss, ["0.weight", "1.weight", "1.bias"], (tokens, targets))
    values = fit(model, (tokens, targets)).score((tokens, targets)).values
    assert_equal(values, scores(G, G, LAMBDA))
    assert (values[4] == 0).all()
    assert (values[:, 4] == 0).all()


# ---------------------------------------------------------------- the order of rows and parameters


def test_parameters_chosen_in_any_order_keep_the_models(model, train, test):
    chosen = rf.Task(model, parameters=["2.weight", "0.bias"])
    G, V = (loop_gradients(model, per_example, ["0.bias", "2.weight"], data) for data in (train, test))
    influence = fit(model, train, task=chosen)
    assert_equal(influence.score(test).values, scores(V, G, LAMBDA))
    hvp = torch.linalg.solve(curvature(G) + LAMBDA * torch.eye(16, dtype=torch.float64), V.T).T
    assert_equal(influence.inverse_hvp(test), hvp)
    assert influence.n_parameters == 16


# ---------------------------------------------------------------- coverage and records


def test_coverage_says_what_is_attributed_how_and_why_the_rest_is_not(train):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3), nn.Identity()).double()
    model[0].weight.requires_grad_(False)
    model[3].spare = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    task = rf.Task(model, parameters=lambda name, p: p.requires_grad and name != "2.bias")
    coverage = fit(model, train, task=task).coverage
    assert (coverage.total, coverage.attributed) == (12 + 4 + 8 + 15 + 5, 4 + 8 + 12 + 5)
    table = coverage.frame().set_index("parameter")
    assert table.loc["0.weight", "reason"] == "frozen (requires_grad is False)"
    assert table.loc["2.bias", "reason"] == "left out by `parameters`"
    assert table.loc["3.spare", "kind"] == "unused"
    assert table.loc["2.weight", "kind"] == "outer"
    assert not table.loc["0.weight", "attributed"]
    assert "29 of 44 parameters attributed (65.9 %)" in coverage.summary
    assert "not attributed: 0.weight, 2.bias" in str(coverage)


def test_the_manifest_is_json_and_says_how_to_repeat_the_scores(influence, test):
    manifest = influence.score(test, normalize="l-relatif").manifest
    assert json.loads(json.dumps(manifest)) == manifest
    expected = {"curvature": "fisher", "solver": "Gram", "exact": True, "damping": LAMBDA, "n_train": N, "seed": 0}
    assert expected.items() <= manifest.items()
    assert manifest["n_parameters"] == 31
    assert manifest["effective_dimension"] == pytest.approx(influence.effective_dimension)
    assert manifest["normalize"] == "l-relatif"


def test_fingerprints_tell_models_and_data_apart(influence, model, train, test):
    def prints(i, data=test):
        manifest = i.score(data).manifest
        return [manifest[f"{part}_fingerprint"] for part in ("model", "train", "test")]

    base = prints(influence)
    assert base == prints(fit(model, train, batch_size=3))
    changed = (train[0].clone(), train[1])
    changed[0][0] += 1
    others = prints(fit(network(1), train)), prints(fit(model, changed)), prints(influence, rows(K, 5))
    for i, other in enumerate(others):
        assert [a == b for a, b in zip(base, other, strict=True)] == [j != i for j in range(3)]


def test_scores_save_and_load_with_their_manifest(influence, test, tmp_path):
    found = influence.score(test, groups="class")
    loaded = rf.Scores.load(found.save(tmp_path / "scores.zarr"))
    assert torch.equal(loaded.values, found.values)
    assert loaded.train_ids.tolist() == [0, 1, 2]
    assert loaded.target_damping == LAMBDA
    assert found.manifest.items() <= loaded.manifest.items()


def test_the_representation_says_whether_it_is_fitted(model, influence):
    assert "not fitted" in repr(rf.Influence(rf.Task(model)))
    assert "n=20, d=31, solver=Gram" in repr(influence)


# ---------------------------------------------------------------- mistakes: before and around fit


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"curvature": "gauss"}, ["'gauss'", '"fisher"']),
        ({"blocks": "layer"}, ["'layer'", '"module"', '"parameter"']),
        ({"blocks": {"a": ["0.*"]}}, ["2.weight", "in no block", "parameters="]),
        ({"blocks": {"a": ["0.*", "2.*"], "b": ["0.bias"]}}, ["0.bias", "'a'", "'b'", "put it in one"]),
        ({"blocks": {"a": ["*"], "b": ["head"]}}, ["'b'", "'head'", "0.weight"]),
    ],
)
def test_options_that_are_none_say_what_there_is(model, options, words):
    with pytest.raises(RefluenceError) as error:
        rf.Influence(rf.Task(model), **options)
    for word in words:
        assert word in str(error.value)


def test_an_unknown_solver_is_refused(model, train):
    with pytest.raises(PlanError, match=r"unknown solver 'lissa'.*rf\.solvers\.Gram\(\)"):
        rf.Influence(rf.Task(model), solver="lissa").fit(train)


@pytest.mark.parametrize(
    "use",
    [
        lambda i: i.score(rows(2, 0)),
        lambda i: i.self_influence(),
        lambda i: i.effective_dimension,
        lambda i: i.damping,
        lambda i: i.at(0.1),
        lambda i: i.coverage,
        lambda i: i.plan,
        lambda i: i.n_train,
    ],
)
def test_whatever_needs_a_fit_says_so(model, use):
    with pytest.raises(NotFittedError, match=r"call fit\(train\) first"):
        use(rf.Influence(rf.Task(model)))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0] * 19, ["20 train examples", "(19,)"]),
        ([[1.0] * 20], ["(1, 20)"]),
        ([1.0] * 7 + [-2.0] + [1.0] * 12, ["weights[7] is -2.0", "≥ 0"]),
        ([1.0] * 19 + [float("nan")], ["weights[19] is nan", "finite"]),
    ],
)
def test_wrong_weights_are_refused_by_row(model, train, weights, words):
    with pytest.raises(DataError) as error:
        fit(model, train, weights=torch.tensor(weights))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("row", [0, 13])
def test_wrong_weights_of_score_are_refused_by_the_right_row(influence, test, row):
    weights = torch.full((N,), -1.0, dtype=torch.float64)
    weights[row] = torch.inf
    with pytest.raises(DataError, match=rf"weights\[{row}\] is inf"):
        influence.score(test, weights=weights)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": "labels"}, ["'labels'", '"class"']),
        ({"groups": [1, 2, 3]}, ["3 labels", "20 train examples"]),
        ({"groups": [None] + [1] * 19}, ["missing labels"]),
        ({"normalize": "cosine"}, ["'cosine'", "theta-relatif", "l-relatif"]),
    ],
)
def test_wrong_options_of_score_say_what_there_is(influence, test, options, words):
    with pytest.raises(DataError) as error:
        influence.score(test, **options)
    for word in words:
        assert word in str(error.value)


def test_groups_by_class_need_one_target_an_example():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    tokens = torch.randint(5, (8, 4))
    influence = rf.Influence(rf.Task(model), damping=0.1).fit((tokens, tokens))
    with pytest.raises(DataError, match="one target for each example"):
        influence.score((tokens, tokens), groups="class")


# ---------------------------------------------------------------- mistakes: data


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x, y: DataLoader(TensorDataset(x, y), shuffle=True), DataError, ["RandomSampler", "shuffle=False"]),
        (lambda x, y: (x[:0], y[:0]), DataError, ["empty", "at least one"]),
        (lambda x, y: (x, y[:-1]), DataError, ["first dimension"]),
        (lambda x, y: (x, y.double()), TaskError, ["integer targets", "torch.float64"]),
        (lambda x, y: (x,), TaskError, ["batch[1]", "one element"]),
        (lambda x, y: {"x": x}, TaskError, ['batch["labels"]']),
    ],
)
def test_wrong_data_are_named_as_train_or_test(model, train, test, part, change, error, words):
    forward = (lambda m, batch: m(batch["x"] if isinstance(batch, dict) else batch[0])) if words[0][0] == "b" else None
    task = rf.Task(model, forward=forward)
    influence = rf.Influence(task, solver=rf.solvers.Gram(), damping=0.1)
    with pytest.raises(error) as caught:
        influence.fit(change(*train)) if part == "train" else influence.fit(train).score(change(*test))
    for word in words:
        assert word in str(caught.value)
    if error is DataError and "first" not in words[0]:
        assert part in str(caught.value)


class Drifting(Dataset):
    """Rows that become others after `fit`."""

    def __init__(self, data):
        self.data, self.shift = data, 0.0

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, row):
        return self.data[0][row] + self.shift, self.data[1][row]


def test_train_rows_that_change_between_two_passes_are_found(model, train, test):
    data = Drifting(train)
    plan = fit(model, data).plan
    memory = int(plan.memory - 0.9 * plan.workload.n * plan.workload.bytes_per_row)
    influence = fit(model, data, execution=rf.Execution(memory=memory))
    data.shift = 1.0
    with pytest.raises(DataError, match=r"rows of the train changed between two passes.*augmentation"):
        influence.score(test)


# ---------------------------------------------------------------- mistakes: numbers


@pytest.mark.parametrize("row", [0, 2, 7, 13, 19])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_named_across_batches(model, train, row, value):
    x = train[0].clone()
    x[row, 1] = value
    with pytest.raises(NonFiniteError, match=rf"the loss of train row {row} is (nan|inf)"):
        fit(model, (torch.where(x.isinf(), x * 0, x), train[1]))


@pytest.mark.parametrize("row", [0, 1, 5])
def test_a_test_row_that_is_not_finite_is_named_as_such(influence, test, row):
    x = test[0].clone()
    x[row, 1] = torch.nan
    with pytest.raises(NonFiniteError, match=rf"test row {row}\b"):
        influence.score((x, test[1]))


class Root(nn.Module):
    """√|x·w| of a linear layer: its gradient is not finite at zero, though its value is."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.head, self.kind = nn.Linear(3, 4, bias=False), nn.Linear(4, 3), kind
        self.curve = nn.Parameter(torch.ones(4))

    def forward(self, x):
        y = self.layer(x)
        y = y.square().sqrt() if self.kind == "outer" else (y.square() * self.curve).sqrt()
        return self.head(y)


@pytest.mark.parametrize("kind", ["outer", "rows"])
@pytest.mark.parametrize("row", [1, 11])
def test_a_gradient_that_is_not_finite_where_the_loss_is_names_row_and_parameter(train, kind, row):
    model = Root(kind).double()
    x = train[0].clone()
    x[row] = 0
    with pytest.raises(NonFiniteError, match=rf"gradient of train row {row} with respect to (layer.weight|curve)"):
        fit(model, (x, train[1]))


# ---------------------------------------------------------------- mistakes: models and losses


class BatchStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        y = self.layer(x)
        return y - y.mean(dim=0)


@pytest.mark.parametrize(
    "model",
    [
        BatchStatistics(),
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)),
        nn.Sequential(nn.Linear(3, 3), nn.Softmax(dim=0)),
    ],
    ids=["centred", "batch norm without running statistics", "softmax over the batch"],
)
def test_a_model_that_mixes_the_examples_of_a_batch_is_refused(model, train):
    with pytest.raises(TaskError, match=r"mixes the examples of a batch.*one loss per example"):
        fit(model.double(), train)


def test_a_loss_with_the_mean_of_the_batch_in_it_is_refused(model, train):
    def centred(output, batch):
        losses = F.cross_entropy(output, batch[1], reduction="none")
        return losses - losses.mean().detach() + 0.1 * losses.mean()

    with pytest.raises(TaskError, match=r"loss of train row \d is .* alone but .* in a batch"):
        fit(model, train, task=rf.Task(model, centred))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda output, batch: F.cross_entropy(output, batch[1]), ["()", 'reduction="none"']),
        (lambda output, batch: output.flatten(), ["9 values", "3 examples"]),
        (lambda output, batch: F.cross_entropy(output, batch[1], reduction="none")[:, None], ["(3, 1)"]),
    ],
)
def test_a_loss_that_is_not_one_value_an_example_is_refused(model, train, loss, words):
    with pytest.raises(TaskError) as error:
        fit(model, train, task=rf.Task(model, loss))
    for word in words:
        assert word in str(error.value)


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class AlwaysDropping(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


@pytest.mark.parametrize(
    ("inner", "words"),
    [(Noisy(), ["'1'", "Noisy"]), (nn.Sequential(nn.Tanh(), AlwaysDropping()), ["'1.1'", "AlwaysDropping"])],
)
def test_a_random_forward_pass_is_refused_naming_the_module(train, inner, words):
    model = nn.Sequential(nn.Linear(3, 4), inner, nn.Linear(4, 3)).double()
    with pytest.raises(NonDeterministicError, match="two different outputs") as error:
        fit(model, train)
    for word in words:
        assert word in str(error.value)


def test_a_random_loss_is_refused_as_the_loss(model, train):
    task = rf.Task(model, lambda output, batch: output.sum(dim=1) * torch.rand(()))
    with pytest.raises(NonDeterministicError, match=r"^the loss gave two different outputs"):
        fit(model, train, task=task)


def test_dropout_is_off_and_batch_norm_uses_its_running_statistics(train, test):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double().train()
    names = [name for name, _ in model.named_parameters()]
    G, V = (loop_gradients(model, per_example, names, data) for data in (train, test))
    assert_equal(fit(model, train).score(test).values, scores(V, G, LAMBDA))
    assert model.training


# ---------------------------------------------------------------- mistakes: plans


@pytest.mark.parametrize("solver", ["auto", rf.solvers.Gram(), rf.solvers.Dense()], ids=repr)
def test_a_plan_that_does_not_fit_is_refused_before_the_work(model, train, solver):
    with pytest.raises(PlanError, match=r"needs .* but 1\.0 KB may be used.*rf\.Execution\(memory=\.\.\.\)"):
        rf.Influence(rf.Task(model), solver=solver, damping=0.1, execution=rf.Execution(memory="1KB")).fit(train)


def test_a_plan_can_be_had_without_the_work(model, train):
    influence = rf.Influence(rf.Task(model), solver=rf.solvers.Gram(), damping=0.1)
    plan = influence.plan_for(train, n_test=50)
    assert (plan.solver, plan.workload.n, plan.workload.tests, plan.workload.d) == ("Gram", N, 50, 31)
    assert plan.fits
    with pytest.raises(NotFittedError):
        influence.score(train)
