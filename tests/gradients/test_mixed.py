"""Mixed derivatives in inputs and parameters: a closed form, and finite differences of single examples' gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import refluence as rf
from refluence.errors import TaskError
from refluence.gradients.mixed import differentiable_input, mixed_products
from refluence.isolation import evaluation_mode
from support.models import CASES, CLASSES, N, labels, rows
from support.reference import length, loop_gradients

STEP = 3e-5


class Attention(nn.Module):
    """Self-attention by `scaled_dot_product_attention`, with a LayerNorm; x (n, t, 4)."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner, self.head = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, CLASSES)

    def forward(self, x):
        q, k, v = self.inner(self.norm(x)).chunk(3, dim=-1)
        return self.head((x + F.scaled_dot_product_attention(q, k, v)).mean(dim=1))


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.convolution(x)).tanh().mean(dim=(2, 3)))


def built(make, *shape):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().double(), (rows(*shape), labels())


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.1, "gelu", batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(12, CLASSES))


def recurrent():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.GRU(4, 3, batch_first=True), nn.Linear(3, CLASSES)

        def forward(self, x):
            return self.head(self.body(x)[0][:, -1])

    return Last()


MODELS = {
    "mlp": lambda: built(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)), 4),
    "mlp without bias": lambda: built(
        lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.GELU(), nn.Linear(6, 3)), 4
    ),
    "cnn with group norm": lambda: built(Convolutional, 2, 5, 4),
    "attention": lambda: built(Attention, 3, 4),
    "transformer encoder": lambda: built(encoder, 3, 4),
    "gru": lambda: built(recurrent, 3, 4),
    "weight norm": CASES["weight norm"].build,
    "in-place arithmetic": CASES["in-place arithmetic on a layer's output"].build,
    "small ResNet": CASES["small ResNet"].build,
    "custom autograd function": CASES["custom autograd function"].build,
}


def loss_of(task):
    return lambda model, batch: task.losses(task.output(model, batch), batch)


def directions_for(model, names, k):
    own = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(5)
    return torch.randn(k, sum(own[name].numel() for name in names), generator=generator, dtype=torch.float64)


def expected_mixed(model, objective, names, batch, directions):
    """(k, n, *x.shape): every entry of x of all examples moved in turn, gradients of one example after the other."""
    x = batch[0]
    found = torch.zeros(len(directions), *x.shape, dtype=torch.float64)
    for index in torch.cartesian_prod(*[torch.arange(size) for size in x.shape[1:]]).reshape(-1, x.ndim - 1).tolist():
        at = (slice(None), *index)
        values = {}
        for j in (-2, -1, 1, 2):
            moved = x.clone()
            moved[at] += j * STEP
            values[j] = loop_gradients(model, objective, names, (moved, *batch[1:])) @ directions.T
        found[(slice(None), *at)] = ((8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * STEP)).T
    return found


def close(found, expected):
    scale = expected.abs().max().clamp(min=1e-3)
    torch.testing.assert_close(found / scale, expected / scale, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("k", [1, 3])
def test_closed_form_of_a_linear_model(k):
    task = rf.Task(nn.Linear(20, 4).double(), loss="mse")
    x, y = rows(20), rows(4)
    directions = directions_for(task.model, ["weight", "bias"], k)
    A, b = task.model.weight.detach(), task.model.bias.detach()
    found = mixed_products(task.model, loss_of(task), ["weight", "bias"], (x, y), directions)
    assert found.shape == (k, N, 20)
    for j in range(N):
        residual = A @ x[j] + b - y[j]
        # ∂/∂x of the gradient (2/o)[r ⊗ x; r] with r = A x + b − y
        weight = torch.einsum("ac,b->abc", A, x[j]) + torch.einsum("a,bc->abc", residual, torch.eye(20).double())
        derivative = 2 / 4 * torch.cat([weight.reshape(80, 20), A])
        torch.testing.assert_close(found[:, j], directions @ derivative, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_finite_differences(name):
    model, batch = MODELS[name]()
    task = rf.Task(model)
    names = task.parameter_names()
    directions = directions_for(model, names, 3)
    with evaluation_mode(model):
        found = mixed_products(model, loss_of(task), names, batch, directions, chunk=2)
    if name == "small ResNet":  # many pixels
        batch, found = tuple(part[:2] for part in batch), found[:, :2]
    close(found, expected_mixed(model, loss_of(task), names, batch, directions))
    assert not found.requires_grad


@pytest.mark.parametrize("name", ["mlp", "cnn with group norm", "attention"])
def test_one_by_one_gives_the_same(name, monkeypatch):
    model, batch = MODELS[name]()
    task = rf.Task(model)
    names = task.parameter_names()
    directions = directions_for(model, names, 5)
    together = mixed_products(model, loss_of(task), names, batch, directions, chunk=2)
    plain = torch.autograd.grad

    def unbatched(*arguments, is_grads_batched=False, **options):
        if is_grads_batched:
            raise RuntimeError("Batching rule not implemented")
        return plain(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", unbatched)
    found = mixed_products(model, loss_of(task), names, batch, directions, chunk=2)
    torch.testing.assert_close(found, together, rtol=1e-10, atol=1e-12)


def test_a_choice_of_parameters_in_its_order():
    model, batch = MODELS["mlp"]()
    task = rf.Task(model)
    names = ["2.bias", "0.weight"]
    directions = directions_for(model, names, 2)
    close(
        mixed_products(model, loss_of(task), names, batch, directions),
        expected_mixed(model, loss_of(task), names, batch, directions),
    )


def test_a_parameter_whose_gradient_does_not_depend_on_the_input_gives_zeros():
    model = nn.Linear(4, 1).double()
    task = rf.Task(model, loss=lambda output, batch: output[:, 0])
    batch, directions = (rows(4),), torch.ones(2, 1, dtype=torch.float64)
    found = mixed_products(model, loss_of(task), ["bias"], batch, directions)
    assert found.shape == (2, N, 4)
    assert not found.any()
    close(
        mixed_products(model, loss_of(task), ["weight"], batch, torch.ones(1, 4).double()), torch.ones(1, N, 4).double()
    )


def test_no_directions():
    model, batch = MODELS["mlp"]()
    task = rf.Task(model)
    names = task.parameter_names()
    found = mixed_products(model, loss_of(task), names, batch, directions_for(model, names, 0))
    assert found.shape == (0, N, 4)


def test_targets_that_are_the_inputs_stay_constant():
    model, x = nn.Linear(4, 4).double(), rows(4)
    task = rf.Task(model, loss="mse")
    directions = directions_for(model, ["weight", "bias"], 2)
    names = ["weight", "bias"]
    found = mixed_products(model, loss_of(task), names, (x, x), directions)
    close(found, mixed_products(model, loss_of(task), names, (x, x.clone()), directions))


def test_mappings_and_a_chosen_input():
    model = nn.Linear(4, CLASSES).double()
    plain = rf.Task(model)
    x, y = rows(4), labels()
    directions = directions_for(model, ["weight", "bias"], 2)
    expected = mixed_products(model, loss_of(plain), ["weight", "bias"], (x, y), directions)
    task = rf.Task(model, forward=lambda m, b: m(b["x"] * b["scale"]))
    batch = {"scale": torch.ones(N, 4).double(), "x": x, "labels": y}
    found = mixed_products(model, loss_of(task), ["weight", "bias"], batch, directions, inputs=lambda b: b["x"])
    torch.testing.assert_close(found, expected)


def test_the_model_and_the_batch_are_unchanged():
    model, batch = MODELS["in-place arithmetic"]()
    task = rf.Task(model)
    before, inputs = copy.deepcopy(model.state_dict()), batch[0].clone()
    names = task.parameter_names()
    mixed_products(model, loss_of(task), names, batch, directions_for(model, names, 2))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(batch[0], inputs)
    assert not batch[0].requires_grad
    assert batch[0].grad is None
    assert length(batch) == N


X, TOKENS = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    "batch",
    [X, (X, TOKENS), [X, X], {"x": X, "labels": TOKENS[:, 0]}, {"tokens": TOKENS, "x": X, "labels": X.clone()},
     ({"x": X, "tokens": TOKENS}, TOKENS)],
)  # fmt: skip
def test_the_one_floating_point_input_is_found(batch):
    assert differentiable_input(batch) is X


@pytest.mark.parametrize(
    "batch", [TOKENS, (TOKENS, X), {"tokens": TOKENS, "labels": X}, {"labels": X}, ("text", X), ()]
)
def test_inputs_without_a_derivative_are_refused(batch):
    with pytest.raises(TaskError, match=r"no derivative.*embeddings.*`forward=`.*`inputs`"):
        differentiable_input(batch)


def test_several_candidates_are_refused():
    with pytest.raises(TaskError, match="several floating-point inputs, a, b: give `inputs`"):
        differentiable_input({"a": X, "b": X.clone(), "labels": X})


def test_chosen_integers_are_refused():
    model, batch = MODELS["mlp"]()
    with pytest.raises(TaskError, match=r"torch\.int64"):
        mixed_products(model, loss_of(rf.Task(model)), ["2.bias"], batch, torch.ones(1, 3), inputs=lambda b: b[1])


def test_an_operation_without_second_derivative_is_named():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.EmbeddingBag(7, 4, mode="sum"), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.head(self.table(torch.arange(3 * N).reshape(N, 3) % 7, per_sample_weights=x))

    model = Bag().double()
    task = rf.Task(model)
    names = ["table.weight"]
    with pytest.raises(TaskError, match=r"Bag.*_embedding_bag"):
        mixed_products(model, loss_of(task), names, (rows(3), labels()), directions_for(model, names, 1))
