"""Products with the Hessian and the GGN of a batch, against finite differences of outputs and of plain gradients."""

import copy

import pytest
import torch
from torch import nn

import refluence as rf
from refluence.curvature import products
from refluence.curvature.products import gauss_newton_products, hessian_products
from refluence.errors import TaskError
from refluence.isolation import evaluation_mode
from support.models import CASES, N, labels
from support.reference import one_row

STEP = 3e-5
WEIGHTS = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.25], dtype=torch.float64)


def setup(name, **options):
    task = CASES[name].task(**options)
    return task, CASES[name].build()[1], task.parameter_names()


def loss_of(task):
    return lambda model, batch: task.losses(task.output(model, batch), batch)


def ready(task, names):
    model = task.model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model


def vectors_of(model, names, k):
    generator = torch.Generator().manual_seed(5)
    own = dict(model.named_parameters())
    return {name: torch.randn(k, *own[name].shape, generator=generator, dtype=own[name].dtype) for name in names}


def moved(model, vector, step):
    model = copy.deepcopy(model)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, direction in vector.items():
            own[name] += step * direction
    return model


def difference(function, model, vector):
    """The derivative of function(model) along a vector, by the central difference of order four."""
    at = {j: function(moved(model, vector, j * STEP)) for j in (-2, -1, 1, 2)}
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * STEP)


def flat_gradient(model, value, names):
    own = dict(model.named_parameters())
    leaves = [own[name] for name in names]
    found = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(leaves, found, strict=True)])


def columns(vectors):
    k = len(next(iter(vectors.values())))
    return [{name: vector[i] for name, vector in vectors.items()} for i in range(k)]


def flat(products):
    k = len(next(iter(products.values())))
    return torch.cat([product.reshape(k, product[0].numel() if k else 0) for product in products.values()], dim=1)


def expected_hessian(task, names, batch, weights, vectors):
    w = torch.ones(N, dtype=torch.float64) if weights is None else weights

    def gradient(model):
        return flat_gradient(model, (w * loss_of(task)(model, batch)).sum(), names)

    return torch.stack([difference(gradient, task.model, vector) for vector in columns(vectors)])


def output_hessian(task, output, batch, i):
    x = output[i : i + 1].detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(task.losses(x, one_row(batch, i)).sum(), x, create_graph=True)
    return torch.stack([torch.autograd.grad(entry, x, retain_graph=True)[0].flatten() for entry in slope.flatten()])


def expected_gauss_newton(task, names, batch, weights, vectors):
    w = torch.ones(N, dtype=torch.float64) if weights is None else weights
    output = task.output(task.model, batch)
    hessians = [output_hessian(task, output, batch, i) for i in range(N)]
    found = []
    for vector in columns(vectors):
        tangent = difference(lambda model: task.output(model, batch).detach(), task.model, vector)
        curved = torch.stack([w[i] * hessians[i] @ tangent[i].flatten() for i in range(N)]).reshape(output.shape)
        found.append(flat_gradient(task.model, (task.output(task.model, batch) * curved).sum(), names))
    return torch.stack(found)


def close(found, expected):
    scale = expected.abs().max().clamp(min=1e-3)
    torch.testing.assert_close(found / scale, expected / scale, rtol=1e-6, atol=2e-7)


# One of each kind: what only matters to how gradients are recorded is left out, and what has no second derivative.
LEFT_OUT = (" as long as ", "conv1d", "conv3d", "batch norm of", "sequence first", "embedding bag", "conv2d as wide",
            "conv2d stride leaving", "conv2d padding ", "used by the first rows", "_idx", "cross-att")  # fmt: skip
MODELS = [name for name in CASES if not any(part in name for part in LEFT_OUT)]
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
FEW_MODELS = pytest.mark.parametrize(
    "name",
    ["linear without bias", "conv2d padding", "layer norm", "transformer encoder", "tied head with bias", "gru",
     "weight norm", "frozen layer", "unused layer", "in-place arithmetic on a layer's output", "group norm"],
)  # fmt: skip


def check(found, vectors, expected):
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in vectors.items()}
    assert not any(value.requires_grad for value in found.values())
    close(flat(found), expected)


def check_hessian(name, weights=WEIGHTS, k=2, chunk=2, names=None):
    task, batch, every = setup(name)
    names = every if names is None else names
    model = ready(task, every)
    vectors = vectors_of(model, names, k)
    found = hessian_products(model, loss_of(task), names, batch, weights, vectors, chunk)
    check(found, vectors, expected_hessian(task, names, batch, weights, vectors))


def check_gauss_newton(name, weights=WEIGHTS, k=2, chunk=2, names=None):
    task, batch, every = setup(name)
    names = every if names is None else names
    model = ready(task, every)
    vectors = vectors_of(model, names, k)
    found = gauss_newton_products(model, task, names, batch, weights, vectors, chunk)
    check(found, vectors, expected_gauss_newton(task, names, batch, weights, vectors))


CHECKS = pytest.mark.parametrize("check_products", [check_hessian, check_gauss_newton])


@EVERY_MODEL
@CHECKS
def test_products_of_every_model(name, check_products):
    check_products(name)


@FEW_MODELS
@CHECKS
def test_products_by_double_backward(name, check_products, monkeypatch):
    def refused(*arguments, **options):
        raise NotImplementedError("no forward derivative")

    monkeypatch.setattr(products, "jvp", refused)
    check_products(name)


@pytest.mark.parametrize("name", ["linear", "conv2d padding", "transformer encoder", "tied head", "gru"])
@pytest.mark.parametrize("k", [1, 7])
@CHECKS
def test_chunks_and_no_weights(name, k, check_products):
    check_products(name, None, k, 3)


@pytest.mark.parametrize("names", [["0.weight", "0.bias"], ["2.bias"], ["2.weight", "0.bias"]])
@CHECKS
def test_the_other_parameters_are_constant(names, check_products):
    check_products("linear", names=names)


@pytest.mark.parametrize("name", ["linear", "layer norm", "language model with ignored targets"])
def test_all_columns_are_the_dense_symmetric_matrix(name):
    task, batch, names = setup(name)
    model = ready(task, names)
    own = dict(model.named_parameters())
    d = sum(own[key].numel() for key in names)
    parts = torch.eye(d, dtype=torch.float64).split([own[key].numel() for key in names], dim=1)
    units = {key: part.reshape(d, *own[key].shape) for key, part in zip(names, parts, strict=True)}
    H = flat(hessian_products(model, loss_of(task), names, batch, WEIGHTS, units, 64))
    close(H, expected_by_autograd(task, names, batch))
    torch.testing.assert_close(H, H.T, rtol=1e-9, atol=1e-11)
    C = flat(gauss_newton_products(model, task, names, batch, WEIGHTS, units, 64))
    torch.testing.assert_close(C, C.T, rtol=1e-9, atol=1e-11)
    if task.loss == "cross_entropy":
        assert torch.linalg.eigvalsh(C)[0] > -1e-11


def expected_by_autograd(task, names, batch):
    own = dict(task.model.named_parameters())
    leaves = [own[key] for key in names]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value = (WEIGHTS * loss_of(task)(task.model, batch)).sum()
    slopes = torch.autograd.grad(value, leaves, create_graph=True)
    rows = [torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True)
            for slope in slopes for entry in slope.flatten()]  # fmt: skip
    return torch.stack(
        [torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(leaves, row, strict=True)])
         for row in rows]
    )  # fmt: skip


@CHECKS
def test_no_vectors_give_no_products(check_products):
    task, batch, names = setup("linear")
    model = ready(task, names)
    vectors = vectors_of(model, names, 0)
    if check_products is check_hessian:
        found = hessian_products(model, loss_of(task), names, batch, None, vectors, 4)
    else:
        found = gauss_newton_products(model, task, names, batch, None, vectors, 4)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in vectors.items()}


def test_float32_parameters_give_float32_products():
    task, batch, names = setup("linear")
    model = ready(task, names)
    vectors = vectors_of(model, names, 3)
    expected = flat(hessian_products(model, loss_of(task), names, batch, WEIGHTS, vectors, 3))
    model, batch = model.float(), (batch[0].float(), batch[1])
    for call in (
        lambda: hessian_products(model, loss_of(task), names, batch, WEIGHTS, vectors, 3),
        lambda: gauss_newton_products(model, task, names, batch, WEIGHTS, vectors, 3),
    ):
        assert all(value.dtype == torch.float32 for value in call().values())
    found = flat(hessian_products(model, loss_of(task), names, batch, WEIGHTS, vectors, 3)).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["linear", "transformer encoder", "small ResNet", "in-place relu", "checkpointed block", "gru"]
)
def test_the_model_and_the_settings_of_torch_are_unchanged(name):
    task, batch, names = setup(name)
    model = task.model.train()
    before = copy.deepcopy(model.state_dict())
    settings = [torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled(),
                torch.backends.cudnn.enabled, torch.get_rng_state().tolist()]  # fmt: skip
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with evaluation_mode(model):
        vectors = vectors_of(model, names, 2)
        hessian_products(model, loss_of(task), names, batch, None, vectors, 2)
        gauss_newton_products(model, task, names, batch, None, vectors, 2)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert settings == [torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled(),
                        torch.backends.cudnn.enabled, torch.get_rng_state().tolist()]  # fmt: skip


def test_an_operation_without_the_derivatives_is_named():
    task, batch, names = setup("embedding bag")
    model = ready(task, names)
    vectors = vectors_of(model, names, 1)
    with pytest.raises(TaskError, match=r'Hessian of Sequential.*_embedding_bag.*"ggn" or "fisher"'):
        hessian_products(model, loss_of(task), names, batch, None, vectors, 1)
    with pytest.raises(TaskError, match=r'Gauss–Newton matrix of Sequential.*_embedding_bag.*"fisher"'):
        gauss_newton_products(model, task, names, batch, None, vectors, 1)


def test_an_output_of_several_tensors_is_refused():
    model = nn.Linear(2, 3).double()
    task = rf.Task(model, loss=lambda output, batch: output[0].sum(dim=1), forward=lambda m, b: (m(b[0]), m(b[0])))
    batch = (torch.randn(N, 2, dtype=torch.float64),)
    with pytest.raises(TaskError, match="forward="):
        gauss_newton_products(model, task, ["weight"], batch, None, vectors_of(model, ["weight"], 1), 1)


def test_an_error_of_the_model_stays_its_own():
    model = nn.Linear(2, 3).double()
    task = rf.Task(model)
    batch = (torch.randn(N, 5, dtype=torch.float64), labels())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        hessian_products(model, loss_of(task), ["weight"], batch, None, vectors_of(model, ["weight"], 1), 1)
