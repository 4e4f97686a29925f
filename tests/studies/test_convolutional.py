"""The convolutional panel: what is held is stationary, and refits do, to first order, what the Hessian predicts."""

import copy
import json

import pandas as pd
import pytest
import torch
from torch import nn

from refluence.errors import DataError, SolverError
from refluence.studies.leave_one_out import ConvolutionalOptions, run_convolutional
from refluence.studies.leave_one_out.network import HeldLosses, Images, _batches, load_images
from refluence.zoo.models import AllCnn

pytestmark = pytest.mark.slow

L2, DAMPING = 1e-3, 0.5


@pytest.fixture(scope="module")
def images():
    try:
        found = load_images(ConvolutionalOptions(n=60))
    except DataError:
        pytest.skip("needs MNIST: set REFLUENCE_DATA, or refluence data fetch mnist")
    return Images(found.train, tuple(part[:6_600] for part in found.test), found.rows)


@pytest.fixture(autouse=True)
def _no_second_load(request, monkeypatch):
    if "panel" in request.fixturenames or "images" in request.fixturenames:
        found = request.getfixturevalue("images")
        monkeypatch.setattr("refluence.studies.leave_one_out.convolutional.load_images", lambda options: found)


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    model = AllCnn(1, 10)
    train = torch.rand(12, 1, 28, 28), torch.randint(10, (12,))
    return model, train, HeldLosses(copy.deepcopy(model), train, L2, DAMPING)


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def reference(model, train, held, theta, removed=()):
    """The objective without some rows, and its gradient, in float64 by autograd."""
    double = copy.deepcopy(model).double()
    start = flat([p.detach() for p in model.parameters()]).double()
    parameters = list(double.parameters())
    x, y = train[0].double(), train[1]

    def put(values):
        with torch.no_grad():
            for p, piece in zip(parameters, values.split([p.numel() for p in parameters]), strict=True):
                p.copy_(piece.view(p.shape))

    put(start)
    mean = nn.functional.cross_entropy(double(x), y) + L2 / 2 * flat(parameters).square().sum()
    slope = flat(torch.autograd.grad(mean, parameters))
    put(theta)
    point, n = flat(parameters), len(y)
    losses = nn.functional.cross_entropy(double(x), y, reduction="none")
    moved = point - start
    total = losses.sum() - n * (slope @ point) + n * DAMPING / 2 * moved @ moved - losses[list(removed)].sum()
    value = total / (n - len(removed)) + L2 / 2 * point @ point
    return value.detach(), flat(torch.autograd.grad(value, parameters))


@pytest.mark.parametrize("removed", [(), (3,), (0, 7)])
def test_held_losses_are_those_of_float64(problem, removed):
    model, train, held = problem
    generator = torch.Generator().manual_seed(1)
    theta = held.start + 0.01 * torch.randn(held.d, generator=generator, dtype=torch.float64)
    value, gradient = held.of_all(theta[None])
    less, less_gradient = held.of_sets(theta[None], [list(removed)])
    count = held.n - len(removed)
    found = (value - less)[0] / count + L2 / 2 * theta @ theta
    slope = (gradient - less_gradient)[0] / count + L2 * theta
    expected, expected_slope = reference(model, train, held, theta, removed)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-4, atol=1e-6)


def test_with_nothing_removed_the_network_is_stationary(problem):
    _, _, held = problem
    _, gradient = held.of_all(held.start[None])
    assert float((gradient[0] / held.n + L2 * held.start).norm()) < 1e-7


def test_every_epoch_has_every_row_once_and_does_not_depend_on_where_it_is_taken_up():
    options = ConvolutionalOptions(n=1_300, steps=9)
    steps = dict(_batches(options, 0, 9))
    assert sorted(steps) == list(range(9))
    for epoch in range(3):
        rows = torch.cat([steps[3 * epoch + i] for i in range(3)])
        assert rows.sort().values.tolist() == list(range(1_300))
    resumed = dict(_batches(options, 4, 9))
    assert sorted(resumed) == list(range(4, 9))
    assert all(torch.equal(resumed[step], steps[step]) for step in resumed)


@pytest.fixture(scope="module")
def panel(tmp_path_factory, images):
    out = tmp_path_factory.mktemp("panel") / "cnn"
    options = ConvolutionalOptions(n=60, steps=200, top=4, damping=3.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refluence.studies.leave_one_out.convolutional.load_images", lambda options: images)
        return out, options, run_convolutional(options, out, progress=False)


def test_refits_do_to_first_order_what_the_hessian_predicts_and_the_ggn_less_so(panel):
    """At a damping at which they differ; under ten times as much all agree."""
    _, _, summary = panel
    assert summary["refits_converged"] == 4
    assert summary["cg"]["pearson"] > 0.999
    assert summary["cg"]["slope"] == pytest.approx(0.91, abs=0.05)
    assert summary["ggn"]["pearson"] < summary["cg"]["pearson"]
    assert summary["ggn"]["rmse_over_sd"] > 2 * summary["cg"]["rmse_over_sd"]


def test_it_writes_what_every_study_writes(panel):
    out, options, summary = panel
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    frame = pd.read_parquet(out / "results.parquet")
    assert len(frame) == options.top
    assert (frame["predicted_cg"].abs().diff().dropna() <= 0).all()
    for name in ("figure.png", "figure.svg", "report.html", "statistics.parquet"):
        assert (out / name).stat().st_size > 0


def test_run_again_nothing_is_computed(panel, monkeypatch):
    out, options, summary = panel
    monkeypatch.setattr("refluence.studies.leave_one_out.convolutional.refits", None)
    monkeypatch.setattr("refluence.studies.leave_one_out.network._steps", None)
    assert run_convolutional(options, out, progress=False) == summary


def test_negative_curvature_is_an_error_and_nothing_is_lost(tmp_path, images):
    with pytest.raises(SolverError, match="negative curvature"):
        run_convolutional(ConvolutionalOptions(n=60, steps=4, top=4, damping=1e-6), tmp_path / "cnn", progress=False)
    assert (tmp_path / "cnn" / "stages" / "training").is_dir()
