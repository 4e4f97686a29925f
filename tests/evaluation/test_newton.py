"""Newton-corrected removal against a dense float64 Newton step, and against refits where the step is exact."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import refluence as rf
from refluence.errors import DataError, PlanError, SolverError
from refluence.evaluation.newton import inverse_products, newton_removal, newton_steps
from refluence.solvers import ConjugateGradient, Dense, Ekfac, Gram, Identity
from support.curvatures import DenseReference, LeastSquares
from support.problems import close, problem

L2, DAMPING = 0.03, 0.01
SETS = [2, [0, 7, 9], (4,), [], [5, 3]]


def fitted(model, train, loss="cross_entropy", solver=None, curvature="ggn", l2=L2, damping=DAMPING, **options):
    weights = options.pop("weights", None)
    options = {"batch_size": 4, "progress": False, **options}
    task = rf.Task(model, loss=loss, l2=l2, measurement=options.pop("measurement", None))
    return rf.Influence(task, curvature, solver or Dense(), damping, **options).fit(train, weights=weights)


def dense_step(reference, removed, columns, l2=L2, damping=DAMPING):
    """Δθ, u and tr M by plain linear algebra: the Hessian without the removed examples, solved."""
    n, s = reference.n, len(removed)
    theta = torch.cat([leaf.detach().flatten() for leaf in reference.leaves])
    weights, J, middle = reference.w, reference.jacobians, reference.output_hessians
    u = (weights[removed, None] * reference.gradients[removed] + l2 * theta).sum(dim=0)
    own = torch.einsum("n,nod,nop,npe->de", weights[removed], J[removed], middle[removed], J[removed]) / n
    whole, step, leverage = reference.curvature("ggn"), torch.zeros_like(u), 0.0
    for block in columns:
        eye = torch.eye(len(block), dtype=torch.float64)
        A = whole[block][:, block] + (damping + l2 * (1 - s / n)) * eye
        step[block] = torch.linalg.solve(A - own[block][:, block], u[block] / n)
        leverage += float(torch.linalg.solve(A, own[block][:, block]).trace())
    return step, u, leverage


def check(influence, reference, columns, tests, measured, removals, l2=L2, damping=DAMPING):
    """Every number of `newton_removal` and `newton_steps`."""
    found = newton_removal(influence, tests.batch, removals, progress=False)
    steps = newton_steps(influence, removals)
    sets = [[one] if isinstance(one, int) else list(one) for one in removals]
    assert found.removed == tuple(map(tuple, sets))
    outputs = torch.cat(tests.outputs)
    whole = reference.curvature("ggn")
    inverse = torch.zeros_like(whole)
    for block in columns:
        eye = torch.eye(len(block), dtype=torch.float64)
        inverse[block[:, None], block] = torch.linalg.inv(whole[block][:, block] + (damping + l2) * eye)
    changes, first, leverages, expected_steps = [], [], [], []
    for removed in sets:
        step, u, leverage = dense_step(reference, removed, columns, l2, damping)
        moved = outputs + (tests.jacobians @ step).reshape(outputs.shape)
        changes.append(measured(moved, tests.batch) - measured(outputs, tests.batch))
        first.append(tests.measured_gradients @ inverse @ u / reference.n)
        leverages.append(leverage)
        expected_steps.append(step)
    close(found.changes, torch.stack(changes, dim=1), 1e-9)
    close(found.first_order, torch.stack(first, dim=1), 1e-9)
    close(found.leverage, torch.tensor(leverages, dtype=torch.float64), 1e-9)
    close(steps, torch.stack(expected_steps), 1e-9)


def as_tests(model, names, loss, batch, measured=None):
    tests = DenseReference(model, names, loss, batch)
    other = tests if measured is None else DenseReference(model, names, measured, batch)
    tests.measured_gradients = other.gradients
    return tests


@pytest.mark.parametrize(("structure", "weighted"), [("full", False), ("module", True), ("dict", True)])
@pytest.mark.parametrize("name", ["mlp", "mlp without bias", "cnn", "transformer", "frozen"])
def test_the_newton_step_is_the_dense_one(name, structure, weighted):
    """GGN, sets of examples, nothing removed, uneven batches, several blocks, weights, frozen layers, attention."""
    given = problem(name, weighted)
    influence = fitted(given.model, given.train, given.loss, blocks=given.blocks(structure), weights=given.weights)
    tests = as_tests(given.model, given.names, given.loss, given.test)
    columns = list(given.columns(structure).values())
    check(influence, given.reference, columns, tests, tests.losses, SETS)


@pytest.mark.parametrize(("batch_size", "columns"), [(1, 20_000), (3, 20_000), (50, 1 << 29)])
def test_batches_and_tiles_do_not_matter(batch_size, columns, monkeypatch):
    given = problem("mlp")
    monkeypatch.setattr("refluence.evaluation.newton.COLUMN_BYTES", columns)
    influence = fitted(given.model, given.train, batch_size=batch_size)
    expected = newton_removal(fitted(given.model, given.train), given.test, progress=False)
    found = newton_removal(influence, given.test, progress=False)
    close(found.changes, expected.changes, 1e-11)
    close(found.leverage, expected.leverage, 1e-11)


def margin(output, batch):
    """−log p/(1−p)."""
    p = output.softmax(dim=1)[torch.arange(len(output)), batch[1]]
    return -(p / (1 - p)).log()


def test_the_measurement_is_of_the_moved_outputs():
    """Not its linear term: a margin, which bends."""
    given = problem("mlp")
    influence = fitted(given.model, given.train, measurement="margin")
    tests = as_tests(given.model, given.names, given.loss, given.test, margin)
    check(influence, given.reference, list(given.columns("full").values()), tests, margin, SETS)


SOFTMAX = problem("mlp").train


def softmax():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Linear(4, 3).double()


@pytest.mark.parametrize(
    ("solver", "curvature"),
    [
        (Dense(), "ggn"),
        (Dense(), "hessian"),
        (Gram(), "ggn"),
        (ConjugateGradient(rtol=1e-13), "hessian"),
        (ConjugateGradient(rtol=1e-13), "ggn"),
    ],
)
def test_exact_solvers_agree_on_softmax_regression(solver, curvature):
    """Linear in its parameters, so that the Hessian is the GGN."""
    model = softmax()
    names = ["weight", "bias"]
    influence = fitted(model, SOFTMAX, solver=solver, curvature=curvature)
    test = problem("mlp").test
    tests = as_tests(model, names, "cross_entropy", test)
    reference = DenseReference(model, names, "cross_entropy", SOFTMAX)
    check(influence, reference, [torch.arange(15)], tests, tests.losses, SETS)


def test_an_approximate_solver_corrects_its_own_curvature():
    """EK-FAC: A is its inverse's inverse, the removed rows are exact."""
    given = problem("mlp")
    influence = fitted(given.model, given.train, solver=Ekfac(), damping=1.0)
    d, n = influence.n_parameters, influence.n_train
    eye = torch.eye(d, dtype=torch.float64)
    reference = given.reference
    theta = torch.cat([leaf.detach().flatten() for leaf in reference.leaves])
    for removed in ([3], [1, 6]):
        s = len(removed)
        shifted = influence.at(1.0 - L2 * s / n)
        A = torch.linalg.inv(inverse_products(shifted, eye))
        own = torch.einsum(
            "nod,nop,npe->de",
            reference.jacobians[removed], reference.output_hessians[removed], reference.jacobians[removed],
        )  # fmt: skip
        u = (reference.gradients[removed] + L2 * theta).sum(dim=0)
        expected = torch.linalg.solve(A - own / n, u / n)
        close(newton_steps(influence, [removed])[0], expected, 1e-9)


def least_squares_minimum(data, keep, l2, n):
    """The minimiser of (1/n) Σ_kept [ℓ + (l2/2)‖θ‖²] in closed form."""
    x, y = torch.cat([data.x, torch.ones(len(data.x), 1).double()], 1)[keep], data.y[keep]
    share = len(keep) / n
    moment = 2 / data.o * x.T @ x / n + share * l2 * torch.eye(x.shape[1]).double()
    theta = torch.linalg.solve(moment, 2 / data.o * x.T @ y / n)
    moved = LeastSquares()
    moved.W, moved.b = theta[:-1].T.contiguous(), theta[-1]
    return moved


@pytest.mark.parametrize("removals", [None, [[0, 4], [9], [30, 1, 2, 17]]])
def test_of_least_squares_it_is_the_refit(removals):
    """r_i/(1 − h_i): exact, for single examples and sets, to rounding."""
    data, tests = LeastSquares(), LeastSquares(n=7, seed=1)
    n = len(data.x)
    at = least_squares_minimum(data, list(range(n)), L2, n)
    influence = fitted(at.model(), (data.x, data.y), "mse", damping=0.0)
    found = newton_removal(influence, (tests.x, tests.y), removals, progress=False)
    sets = [[i] for i in range(n)] if removals is None else removals

    def losses(of):
        return (tests.x @ of.W.T + of.b - tests.y).square().mean(dim=1)

    refits = [least_squares_minimum(data, [j for j in range(n) if j not in one], L2, n) for one in sets]
    close(found.changes, torch.stack([losses(of) - losses(at) for of in refits], dim=1), 1e-11)
    steps = torch.stack([torch.cat([of.W.flatten(), of.b]) for of in refits])
    close(newton_steps(influence, removals), steps - torch.cat([at.W.flatten(), at.b]), 1e-11)


class Softmax:
    """Softmax regression on rows with a bias column, θ (classes, inputs): the mean loss of some rows + (l2/2)‖θ‖²."""

    def __init__(self, x, y, l2):
        self.x, self.y, self.l2 = x, nn.functional.one_hot(y, 10).double(), l2

    def slope(self, theta, keep):
        p = (self.x[keep] @ theta.T).softmax(dim=1)
        return ((p - self.y[keep]).T @ self.x[keep]) / len(keep) + self.l2 * theta

    def hessian(self, theta):
        p = (self.x @ theta.T).softmax(dim=1)
        middle = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).reshape(len(p), 100, 1)
        H = (middle * self.x[:, None, :]).reshape(len(p), -1).T @ self.x / len(p)
        return H.reshape(10, 10, 65, 65).transpose(1, 2).reshape(650, 650) + self.l2 * torch.eye(650).double()

    def minimum(self, start, keep, inverse=None):
        """By Newton's method, or with the inverse of one Hessian, to rounding."""
        theta = start
        for _ in range(300):
            slope = self.slope(theta, keep)
            if slope.norm() < 1e-11:
                return theta
            step = torch.linalg.inv(self.hessian(theta)) if inverse is None else inverse
            theta = theta - (step @ slope.flatten()).reshape(10, 65)
        raise AssertionError(f"gradient norm {slope.norm()}")


@pytest.mark.parametrize(("l2", "pearson", "gain"), [(1e-2, 0.9999, 4), (1e-3, 0.9995, 4)])
def test_leave_one_out_of_digits_is_predicted(l2, pearson, gain):
    """The examples of largest self-influence among them, by real refits; far nearer to them than influence."""
    x, y = load_digits(return_X_y=True)
    x, y, n = torch.from_numpy(x / 16), torch.from_numpy(y), 1437
    with_bias = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)
    of = Softmax(with_bias[:n], y[:n], l2)
    theta = of.minimum(torch.zeros(10, 65).double(), torch.arange(n))
    model = nn.Linear(64, 10).double()
    model.weight.data, model.bias.data = theta[:, :64].clone(), theta[:, 64].clone()
    influence = fitted(model, (x[:n], y[:n]), l2=l2, damping=0.0, batch_size=None)
    tests = slice(n, n + 40)
    size = influence.self_influence().topk(25).indices.tolist()
    chosen = sorted({*size, *range(0, n, 50)})
    found = newton_removal(influence, (x[tests], y[tests]), chosen, progress=False)

    def losses(theta):
        return nn.functional.cross_entropy(with_bias[tests] @ theta.T, y[tests], reduction="none")

    inverse = torch.linalg.inv(of.hessian(theta))
    everything = torch.arange(n)
    moved = [of.minimum(theta, everything[everything != i], inverse) for i in chosen]
    measured = torch.stack([losses(one) - losses(theta) for one in moved], dim=1)
    assert np.corrcoef(found.changes.flatten(), measured.flatten())[0, 1] >= pearson
    assert gain * (found.changes - measured).norm() < (found.first_order - measured).norm()


def test_the_frame_names_every_removal():
    given = problem("mlp")
    found = newton_removal(fitted(given.model, given.train), given.test, [4, [1, 2]], progress=False)
    frame = found.to_frame()
    assert list(frame.columns) == ["removed", "test", "change", "first_order", "leverage"]
    assert frame["removed"].tolist() == [4] * 4 + [(1, 2)] * 4
    assert frame["change"].tolist() == found.changes.T.flatten().tolist()
    assert frame["leverage"].tolist() == [found.leverage[0]] * 4 + [found.leverage[1]] * 4


def test_float32_models_are_solved_in_float64():
    given = problem("mlp")
    single = tuple(part.float() if part.is_floating_point() else part for part in given.train)
    tests = tuple(part.float() if part.is_floating_point() else part for part in given.test)
    model = copy.deepcopy(given.model).float()
    found = newton_removal(fitted(model, single), tests, SETS, progress=False)
    expected = newton_removal(fitted(given.model, given.train), given.test, SETS, progress=False)
    close(found.changes, expected.changes, 1e-5)


class TestErrors:
    @pytest.mark.parametrize("curvature", ["fisher", "true_fisher", "mc_fisher"])
    def test_other_curvatures(self, curvature):
        given = problem("mlp")
        with pytest.raises(PlanError, match='fit with curvature "ggn"'):
            newton_removal(fitted(given.model, given.train, curvature=curvature), given.test, progress=False)

    def test_the_hessian_of_a_network(self):
        given = problem("mlp")
        influence = fitted(given.model, given.train, curvature="hessian", damping=5.0)
        with pytest.raises(PlanError, match="not linear in the parameters"):
            newton_removal(influence, given.test, progress=False)

    def test_gradient_products(self):
        given = problem("mlp")
        with pytest.raises(PlanError, match="no curvature"):
            newton_removal(fitted(given.model, given.train, solver=Identity()), given.test, progress=False)

    def test_an_example_that_alone_determines_a_direction(self):
        """Its leverage is 1 without l2 and damping."""
        data = LeastSquares()
        x = torch.zeros(31, 21).double()
        x[:, :20] = data.x
        x[6, 20] = 1.0
        model = nn.Linear(21, 4, bias=False).double()
        influence = fitted(model, (x, data.y), "mse", l2=0.0, damping=0.0)
        with pytest.raises(SolverError, match="without train example 6 the damped"):
            newton_removal(influence, (x, data.y), progress=False)
        with pytest.raises(SolverError, match=r"without train example 6 \(removed together with 1 more\) the damped"):
            newton_removal(influence, (x, data.y), [[2, 6]], progress=False)

    @pytest.mark.parametrize(
        ("removals", "message"),
        [
            ([11], "removal 0 has row 11"),
            ([0, [-1, 2]], "removal 1 has row -1"),
            ([[3, 3]], "removal 0 has a row twice"),
            ([list(range(11))], "removal 0 leaves no example"),
        ],
    )
    def test_rows(self, removals, message):
        given = problem("mlp")
        with pytest.raises(DataError, match=message):
            newton_removal(fitted(given.model, given.train), given.test, removals, progress=False)

    def test_more_than_the_memory(self, monkeypatch):
        given = problem("mlp")
        influence = fitted(given.model, given.train)
        monkeypatch.setattr(rf.Execution, "budget", lambda self, device: 30_000)
        newton_removal(influence, given.test, [0], progress=False)
        with pytest.raises(PlanError, match="remove fewer together"):
            newton_removal(influence, given.test, [list(range(10))], progress=False)

    def test_a_loss_that_is_not_convex_in_the_outputs(self):
        given = problem("mlp")
        task = rf.Task(given.model, loss=lambda output, batch: output.sin().sum(dim=1))
        influence = rf.Influence(task, "ggn", Dense(), 5.0, progress=False).fit(given.train)
        with pytest.raises(rf.errors.TaskError, match="eigenvalue"):
            newton_removal(influence, given.test, progress=False)
