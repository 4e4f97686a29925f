"""Ensembles: the mean, TracIn's and TRAK's forms against their formulas in float64, and the error over models."""

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn

import refluence as rf
from refluence.errors import DataError, NotFittedError, RefluenceError
from refluence.solvers import Dense, Gram, Identity, Sketched
from refluence.zoo import build_model, load_dataset
from support.problems import close, problem
from support.reference import loop_gradients

GIVEN = problem("mlp")
DAMPING = 0.1
STEPS = [0.5, 0.2, 0.1]


def models(count=3):
    """Several networks of one architecture."""
    found = []
    with torch.random.fork_rng():
        for seed in range(count):
            torch.manual_seed(seed)
            model = copy.deepcopy(GIVEN.model)
            for parameter in model.parameters():
                parameter.data += 0.3 * torch.randn_like(parameter)
            found.append(model)
    return found


def influence(model, solver=None, **options):
    options = {"damping": DAMPING, "batch_size": 4, "progress": False, **options}
    train = options.pop("train", GIVEN.train)
    task = rf.Task(model, **{name: options.pop(name) for name in ("measurement", "loss", "l2") if name in options})
    return rf.Influence(task, solver=solver or Dense(), **options).fit(train)


def members(**options):
    return [influence(model, **options) for model in models()]


def stacked(of):
    return torch.stack([one.score(GIVEN.test).values for one in of])


def test_the_mean_of_the_members_with_the_standard_error_of_that_mean():
    given = members()
    scores, values = rf.Ensemble(given).score(GIVEN.test), stacked(given)
    close(scores.values, values.mean(dim=0), 1e-12)
    close(scores.error, values.std(dim=0) / 3**0.5, 1e-12)
    assert scores.n_train == given[0].n_train
    assert scores.target_damping == DAMPING


def test_tracin_is_the_sum_over_checkpoints_by_step_sizes():
    """Gradient products, by a loop of autograd."""
    given = members(solver=Identity(), damping=0.0)
    scores = rf.Ensemble(given, form="tracin", weights=STEPS).score(GIVEN.test)
    losses = GIVEN.reference.losses
    products = []
    for step, one in zip(STEPS, given, strict=True):
        value = lambda m, part: losses(m(part[0]), part)  # noqa: E731
        G, V = (loop_gradients(one.task.model, value, GIVEN.names, data) for data in (GIVEN.train, GIVEN.test))
        products.append(step * V @ G.T)
    products = torch.stack(products)
    close(scores.values, products.sum(dim=0), 1e-11)
    close(scores.error, 3 * products.std(dim=0) / 3**0.5, 1e-10)


def margin(model, batch):
    """log p/(1 − p)."""
    p = model(batch[0]).softmax(dim=1)[torch.arange(len(batch[0])), batch[1]]
    return (p / (1 - p)).log()


def trak_parts(given):
    """(Q, K) of every model: 1 − p, and n φ(ΦᵀΦ + nλ)⁻¹φ, dense."""
    n, parts = len(GIVEN.train[1]), []
    for model in given:
        Phi, phi = (loop_gradients(model, margin, GIVEN.names, data) for data in (GIVEN.train, GIVEN.test))
        K = n * phi @ torch.linalg.solve(Phi.T @ Phi + n * DAMPING * torch.eye(Phi.shape[1]).double(), Phi.T)
        with torch.no_grad():
            Q = 1 - model(GIVEN.train[0]).softmax(dim=1)[torch.arange(n), GIVEN.train[1]]
        parts.append((Q, K))
    return torch.stack([Q for Q, _ in parts]), torch.stack([K for _, K in parts])


@pytest.mark.parametrize("solver", [Dense(), Gram()])
@pytest.mark.parametrize("keep", [True, False])
def test_trak_is_the_product_of_two_means(solver, keep):
    """Park et al. 2023, eq. 13–17; the error is of first order in the spread of both."""
    given = models(4)
    ensemble = rf.Ensemble.of(
        rf.Task(GIVEN.model), given, form="trak", keep=keep, solver=solver, damping=DAMPING, progress=False
    ).fit(GIVEN.train)
    scores, (Q, K) = ensemble.score(GIVEN.test), trak_parts(given)
    close(scores.values, Q.mean(dim=0) * K.mean(dim=0), 1e-9)
    linear = Q.mean(dim=0) * K + K.mean(dim=0) * Q[:, None, :]
    close(scores.error, linear.std(dim=0) / 4**0.5, 1e-8)


def test_trak_by_hand_is_the_same():
    """Members whose loss is the margin."""
    from refluence.task import classification_margin

    given = members(loss=classification_margin, measurement=classification_margin)
    Q, K = trak_parts(models())
    close(rf.Ensemble(given, form="trak").score(GIVEN.test).values, Q.mean(dim=0) * K.mean(dim=0), 1e-9)


def test_the_members_own_errors_are_added_in_quadrature():
    options = {"curvature": "mc_fisher", "samples": 4, "solver": Gram()}
    given = [influence(model, seed=i, **options) for i, model in enumerate(models())]
    scores, parts = rf.Ensemble(given).score(GIVEN.test), [one.score(GIVEN.test) for one in given]
    own = torch.stack([part.error for part in parts]).square().mean(dim=0)
    spread = torch.stack([part.values for part in parts]).var(dim=0)
    close(scores.error, ((own + spread) / 3).sqrt(), 1e-10)


def test_a_single_member_is_itself():
    given = members()[:1]
    scores = rf.Ensemble(given).score(GIVEN.test)
    close(scores.values, given[0].score(GIVEN.test).values, 1e-14)
    assert scores.error is None
    noisy = influence(models()[0], solver=Gram(), curvature="mc_fisher")
    close(rf.Ensemble([noisy]).score(GIVEN.test).error, noisy.score(GIVEN.test).error, 1e-12)


def test_self_influence_is_averaged_too():
    given = members()
    own = torch.stack([one.self_influence() for one in given])
    close(rf.Ensemble(given).self_influence(), own.mean(dim=0), 1e-12)
    weights = torch.tensor(STEPS, dtype=torch.float64)
    close(rf.Ensemble(given, "tracin", STEPS).self_influence(), weights @ own, 1e-10)


def test_another_damping():
    given = members()
    moved = [one.at(0.5) for one in given]
    close(rf.Ensemble(given).at(0.5).score(GIVEN.test).values, stacked(moved).mean(dim=0), 1e-12)


def test_weights_groups_and_norms_go_to_the_members():
    given = members()
    options = {"weights": torch.linspace(-1, 2, 11), "normalize": "l-relatif", "groups": "class"}
    scores = rf.Ensemble(given).score(GIVEN.test, **options)
    values = torch.stack([one.score(GIVEN.test, **options).values for one in given])
    close(scores.values, values.mean(dim=0), 1e-12)
    close(scores.error, values.std(dim=0) / 3**0.5, 1e-12)
    assert list(scores.train_ids) == [0, 1, 2]


@pytest.mark.parametrize("keep", [True, False])
def test_models_may_be_modules_states_or_functions(keep):
    given = models()
    forms = [given[0], given[1].state_dict(), lambda: given[2].state_dict()]
    ensemble = rf.Ensemble.of(
        rf.Task(GIVEN.model), forms, keep=keep, solver=Dense(), damping=DAMPING, batch_size=4, progress=False
    ).fit(GIVEN.train)
    before = {name: value.clone() for name, value in GIVEN.model.state_dict().items()}
    close(ensemble.score(GIVEN.test).values, stacked(members()).mean(dim=0), 1e-12)
    assert all(torch.equal(value, before[name]) for name, value in GIVEN.model.state_dict().items())


def test_what_is_not_kept_is_fitted_one_at_a_time():
    alive, most = [], []

    def make(model):
        import weakref

        one = influence(model)
        alive.append(weakref.ref(one))
        most.append(sum(reference() is not None for reference in alive))
        return one

    ensemble = rf.Ensemble([partial(make, model) for model in models()])
    close(ensemble.score(GIVEN.test).values, stacked(members()).mean(dim=0), 1e-12)
    assert max(most) <= 2


def test_the_members_of_an_architecture_have_sketches_of_their_own():
    """Else their errors would be one error."""
    ensemble = rf.Ensemble.of(
        rf.Task(GIVEN.model),
        [GIVEN.model] * 3,
        solver=Sketched(rf.sketches.Gaussian(16, seed=5), corrected=False),
        damping=DAMPING,
        progress=False,
    ).fit(GIVEN.train)
    expected = [
        influence(GIVEN.model, solver=Sketched(rf.sketches.Gaussian(16, seed=5 + c), corrected=False)) for c in range(3)
    ]
    close(ensemble.score(GIVEN.test).values, stacked(expected).mean(dim=0), 1e-9)


def test_the_manifest_names_every_member(tmp_path):
    given = members()
    scores = rf.Ensemble(given, "tracin", STEPS).score(GIVEN.test)
    record = json.loads(json.dumps(scores.manifest))["ensemble"]
    assert record["form"] == "tracin"
    assert record["weights"] == STEPS
    prints = [one["model_fingerprint"] for one in record["members"]]
    assert prints == [one.manifest()["model_fingerprint"] for one in given]
    assert len(set(prints)) == 3
    loaded = rf.Scores.load(scores.save(tmp_path / "scores"))
    close(loaded.error, scores.error, 1e-15)
    assert rf.Ensemble(given, "tracin", STEPS).manifest()["ensemble"] == record


def test_five_networks_on_digits_agree_better_than_one():
    """Ensembles of different seeds are nearer to each other than single networks are."""
    split = load_dataset("digits", n_train=120, n_test=8)
    networks = []
    with torch.random.fork_rng():
        for seed in range(10):
            torch.manual_seed(seed)
            model = build_model("digits", "mlp")
            optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
            for _ in range(40):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(split.train[0]), split.train[1]).backward()
                optimizer.step()
            networks.append(model.eval())

    options = {"damping": 1e-2, "solver": Gram(), "progress": False}
    given = [rf.Influence(rf.Task(network), **options).fit(split.train) for network in networks]

    def correlation(one, other):
        return float(torch.corrcoef(torch.stack([one.values.flatten(), other.values.flatten()]))[0, 1])

    first, second = (rf.Ensemble(some).score(split.test) for some in (given[:5], given[5:]))
    singles = [correlation(given[i].score(split.test), given[5 + i].score(split.test)) for i in range(5)]
    assert correlation(first, second) > max(singles)
    # The error over models is that of the difference of two such ensembles.
    off = (first.values - second.values) / (first.error.square() + second.error.square()).sqrt()
    assert 0.8 < float(off.square().mean().sqrt()) < 2


class TestErrors:
    def test_no_members(self):
        with pytest.raises(RefluenceError, match="at least one"):
            rf.Ensemble([])

    def test_what_is_no_influence(self):
        with pytest.raises(RefluenceError, match="member 0 is Linear"):
            rf.Ensemble([nn.Linear(1, 1)])

    def test_a_function_of_something_else(self):
        with pytest.raises(RefluenceError, match="returned int"):
            rf.Ensemble([lambda: 3]).score(GIVEN.test)

    def test_other_numbers_of_examples(self):
        other = influence(models()[1], train=tuple(part[:7] for part in GIVEN.train))
        with pytest.raises(DataError, match="member 1 of the ensemble has n_train 7 and member 0 has 11"):
            rf.Ensemble([members()[0], other]).score(GIVEN.test)

    def test_other_data(self):
        other = influence(models()[1], train=(GIVEN.train[0] + 1, GIVEN.train[1]))
        with pytest.raises(DataError, match="member 1 of the ensemble has training data"):
            rf.Ensemble([members()[0], other]).score(GIVEN.test)

    @pytest.mark.parametrize(("options", "name"), [({"measurement": "margin"}, "measurement"), ({"l2": 0.1}, "l2")])
    def test_another_task(self, options, name):
        with pytest.raises(DataError, match=f"has {name}"):
            rf.Ensemble([members()[0], influence(models()[1], **options)]).score(GIVEN.test)

    def test_not_fitted(self):
        with pytest.raises(NotFittedError, match="call fit"):
            rf.Ensemble.of(rf.Task(GIVEN.model), models()).score(GIVEN.test)

    def test_trak_of_a_loss(self):
        with pytest.raises(RefluenceError, match="needs the gradients of the margin"):
            rf.Ensemble(members(), form="trak").score(GIVEN.test)
        with pytest.raises(RefluenceError, match="explains the margin of a classifier"):
            rf.Ensemble.of(rf.Task(GIVEN.model, loss="mse"), models(), form="trak")

    def test_trak_by_groups(self):
        ensemble = rf.Ensemble.of(rf.Task(GIVEN.model), models(), form="trak", progress=False).fit(GIVEN.train)
        with pytest.raises(DataError, match="product of two means"):
            ensemble.score(GIVEN.test, groups="class")

    @pytest.mark.parametrize(
        ("form", "weights", "message"),
        [
            ("sum", None, "form must be one of"),
            ("tracin", None, "step sizes: give"),
            ("mean", STEPS, "form 'mean' has none"),
            ("tracin", [1.0], "one number for each of 3"),
        ],
    )
    def test_forms(self, form, weights, message):
        with pytest.raises(RefluenceError, match=message):
            rf.Ensemble(members(), form, weights)
