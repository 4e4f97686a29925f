"""Hessian roots, Fisher roots, sampled gradients and products of a loss in the output, against `torch.func.hessian`."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import refluence as rf
from refluence.curvature.outputs import (
    IndefiniteLossError,
    loss_hessian_roots,
    output_hessian_products,
    root_count,
    sampled_gradients,
    true_fisher_roots,
    true_fisher_shares,
)
from refluence.errors import NonFiniteError, TaskError
from refluence.task import LOSSES

N = 4


def task_of(loss):
    return rf.Task(nn.Linear(2, 2), loss=loss)


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def integers(high, *shape, seed=1):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def ignoring(targets):
    targets = targets.clone()
    targets[0, 0] = -100
    targets[2] = -100
    targets[3, 1:] = -100
    return targets


def softplus_of_margins(output, batch):
    """A multi-class hinge made smooth: convex, and without a closed form here."""
    flat = output.reshape(output.shape[0], -1)
    target = flat.gather(1, batch[1].reshape(len(flat), -1)[:, :1])
    return F.softplus(1 + flat - target).square().sum(dim=1)


def own_cross_entropy(output, batch):
    return F.cross_entropy(output, batch[1], reduction="none")


def huber(output, batch):
    return F.huber_loss(output, batch[1], reduction="none").flatten(1).sum(dim=1)


def in_place(output, batch):
    output -= batch[1]
    return output.flatten(1).pow(4).sum(dim=1)


def linear_loss(output, batch):
    return (output * batch[1]).flatten(1).sum(dim=1)


class _Quartic(torch.autograd.Function):
    """x⁴ with a backward pass that `torch.func` cannot follow."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**4

    @staticmethod
    def backward(ctx, gradient):
        return 4 * ctx.saved_tensors[0] ** 3 * gradient


def custom_function(output, batch):
    return _Quartic.apply(output - batch[1]).flatten(1).sum(dim=1)


CASES = {
    "cross_entropy": ("cross_entropy", normal(N, 3), integers(3, N)),
    "cross_entropy of sequences": ("cross_entropy", normal(N, 2, 3), integers(3, N, 2)),
    "cross_entropy of grids": ("cross_entropy", normal(N, 2, 2, 3), integers(3, N, 2, 2)),
    "cross_entropy with ignored targets": ("cross_entropy", normal(N, 3, 3), ignoring(integers(3, N, 3))),
    "cross_entropy with one class": ("cross_entropy", normal(N, 1), torch.zeros(N, dtype=torch.int64)),
    "mse": ("mse", normal(N, 3), normal(N, 3, seed=1)),
    "mse of scalars": ("mse", normal(N), normal(N, seed=1)),
    "mse of one output": ("mse", normal(N, 1), normal(N, seed=1)),
    "mse of sequences": ("mse", normal(N, 2, 3), normal(N, 2, 3, seed=1)),
    "binary_cross_entropy": ("binary_cross_entropy", normal(N, 3), integers(2, N, 3)),
    "binary_cross_entropy of scalars": ("binary_cross_entropy", normal(N), integers(2, N)),
    "the built-in function": (LOSSES["cross_entropy"], normal(N, 2, 3), ignoring(integers(3, N, 2))),
}
OTHERS = {
    "cross entropy as a function": (own_cross_entropy, normal(N, 3), integers(3, N)),
    "squared hinge": (softplus_of_margins, normal(N, 2, 3), integers(6, N, 2)),
    "huber": (huber, normal(N, 2, 3, scale=3), normal(N, 2, 3, seed=1)),
    "in place": (in_place, normal(N, 3), normal(N, 3, seed=1)),
    "linear": (linear_loss, normal(N, 3), normal(N, 3, seed=1)),
    "custom function": (custom_function, normal(N, 2, 2), normal(N, 2, 2, seed=1)),
    "scalars": (lambda output, batch: output.exp() - batch[1] * output, normal(N), normal(N, seed=1)),
}
BUILT_IN = pytest.mark.parametrize("name", CASES)
EVERY = pytest.mark.parametrize("name", CASES | OTHERS)


def build(name):
    loss, output, targets = (CASES | OTHERS)[name]
    return task_of(loss), output.clone(), (torch.zeros(N, 2, dtype=torch.float64), targets)


def dense_hessians(task, output, batch):
    """(n, o, o): one example after the other, by double backward."""
    found = []
    for i in range(len(output)):
        one = tuple(part[i : i + 1] for part in batch)
        x = output[i : i + 1].clone().requires_grad_()
        (slope,) = torch.autograd.grad(task.losses(x.clone(), one).sum(), x, create_graph=True)
        rows = [
            torch.autograd.grad(entry, x, retain_graph=True)[0].flatten()
            if entry.requires_grad
            else torch.zeros(x[0].numel())
            for entry in slope.flatten()
        ]
        found.append(torch.stack(rows).double())
    return torch.stack(found)


def squares(roots):
    """Σ_q r_q r_qᵀ of each example."""
    flat = roots.flatten(2) if roots.ndim > 2 else roots[..., None]
    return torch.einsum("nqo,nqp->nop", flat, flat)


def close(found, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@EVERY
def test_roots_give_the_hessian_of_every_example(name):
    task, output, batch = build(name)
    roots = loss_hessian_roots(task, output, batch)
    assert roots.shape == (N, root_count(task, output), *output.shape[1:])
    assert root_count(task, output) == output[0].numel()
    close(squares(roots), dense_hessians(task, output, batch))


@pytest.mark.parametrize("name", ["cross_entropy of sequences", "mse", "binary_cross_entropy", "squared hinge"])
def test_the_dense_reference_is_that_of_torch_func(name):
    task, output, batch = build(name)
    for i, expected in enumerate(dense_hessians(task, output, batch)):
        one = tuple(part[i : i + 1] for part in batch)
        found = torch.func.hessian(lambda x, one=one: task.losses(x[None], one).sum())(output[i])
        close(found.reshape(expected.shape), expected)


@EVERY
@pytest.mark.parametrize("k", [0, 1, 5])
def test_products_are_those_of_the_hessian(name, k):
    task, output, batch = build(name)
    tangents = normal(k, *output.shape, seed=2)
    before = output.clone()
    found = output_hessian_products(task, output, batch, tangents)
    expected = torch.einsum(
        "nop,knp->kno", dense_hessians(task, output, batch), tangents.reshape(k, N, output[0].numel())
    )
    assert found.shape == tangents.shape
    close(found.reshape(expected.shape), expected)
    close(output, before, 0, 0)


def enumerated_fisher(task, output, batch, labels):
    """Σ over all joint labels of one example of P(labels) g gᵀ; `labels` is the number of values a label takes."""
    found = []
    for i in range(len(output)):
        target = batch[1][i : i + 1]
        counting = (target != -100).flatten().nonzero()[:, 0].tolist()
        fisher = torch.zeros(output[i].numel(), output[i].numel(), dtype=torch.float64)
        for code in range(labels ** len(counting)):
            drawn = target.clone().flatten()
            for at in counting:
                drawn[at], code = code % labels, code // labels
            one = (batch[0][i : i + 1], drawn.reshape(target.shape))
            x = output[i : i + 1].clone().requires_grad_()
            value = task.losses(x, one).sum()
            gradient = torch.autograd.grad(value, x)[0].flatten()
            probability = torch.exp(-value.detach() * max(1, len(counting)))
            fisher += probability * gradient[:, None] * gradient
        found.append(fisher)
    return torch.stack(found)


@pytest.mark.parametrize("name", [name for name in CASES if "mse" not in name])
def test_true_fisher_is_the_sum_over_all_labels(name):
    task, output, batch = build(name)
    labels = 2 if "binary" in name else output.shape[-1]
    close(squares(true_fisher_roots(task, output, batch)), enumerated_fisher(task, output, batch, labels))


@pytest.mark.parametrize("name", [name for name in CASES if "mse" in name])
def test_true_fisher_of_the_squared_error_is_its_hessian(name):
    task, output, batch = build(name)
    close(squares(true_fisher_roots(task, output, batch)), dense_hessians(task, output, batch))


@BUILT_IN
def test_shares_are_the_true_fisher_over_the_hessian(name):
    task, output, batch = build(name)
    shares = true_fisher_shares(task, output, batch)
    expected = squares(true_fisher_roots(task, output, batch))
    close(shares[:, None, None] * dense_hessians(task, output, batch), expected)


@BUILT_IN
def test_sampled_gradients_have_the_true_fisher_as_their_mean_square(name):
    task, output, batch = build(name)
    samples = 4000
    drawn = sampled_gradients(task, output, batch, 7, samples, seed=3) * samples**0.5
    assert drawn.shape == (N, samples, *output.shape[1:])
    flat = drawn.reshape(N, samples, -1)
    outer = flat[..., :, None] * flat[..., None, :]
    expected = squares(true_fisher_roots(task, output, batch))
    error = outer.std(dim=1) / math.sqrt(samples)
    assert ((outer.mean(dim=1) - expected).abs() <= 5 * error + 1e-12).all()
    # A gradient of a log-likelihood has mean zero under its own labels.
    assert (flat.mean(dim=1).abs() <= 5 * flat.std(dim=1) / math.sqrt(samples) + 1e-12).all()


@pytest.mark.parametrize("name", [name for name in CASES if "mse" not in name])
def test_a_sampled_gradient_is_the_gradient_at_some_label(name):
    task, output, batch = build(name)
    drawn = sampled_gradients(task, output, batch, 0, 3, seed=0) * 3**0.5
    sigmoid = "binary" in name
    p = output.sigmoid() if sigmoid else output.softmax(dim=-1)
    for s in range(3):
        gradient = drawn[:, s]
        # The label is where the gradient is negative: p − y < 0 only for the drawn one.
        labels = (gradient < 0).long() if sigmoid else gradient.argmin(dim=-1)
        labels = torch.where(batch[1] == -100, batch[1], labels.reshape(batch[1].shape))
        x = output.clone().requires_grad_()
        close(gradient, torch.autograd.grad(task.losses(x, (batch[0], labels)).sum(), x)[0])
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("name", ["cross_entropy with ignored targets", "mse of sequences", "binary_cross_entropy"])
@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, N - 1), seed=st.integers(-(2**63), 2**63 - 1), start=st.integers(0, 2**40))
def test_samples_do_not_depend_on_the_batches(name, cut, seed, start):
    task, output, batch = build(name)
    whole = sampled_gradients(task, output, batch, start, 3, seed)
    parts = [
        sampled_gradients(task, output[s], tuple(x[s] for x in batch), start + s.start, 3, seed)
        for s in (slice(0, cut), slice(cut, N))
    ]
    close(torch.cat(parts), whole, 0, 0)
    more = sampled_gradients(task, output, batch, start, 5, seed) * (5 / 3) ** 0.5
    close(more[:, :3], whole)


def test_longer_padding_changes_no_label():
    output, targets = normal(N, 4, 3), integers(3, N, 4)
    targets[:, 2:] = -100
    task = task_of("cross_entropy")
    long = sampled_gradients(task, output, (output, targets), 0, 6, 0)
    short = sampled_gradients(task, output[:, :2], (output, targets[:, :2]), 0, 6, 0)
    close(long[:, :, :2], short)
    assert not long[:, :, 2:].any()


def test_rows_samples_outputs_and_seeds_are_drawn_apart():
    output = torch.zeros(6, 7, dtype=torch.float64)
    task = task_of("mse")
    drawn = [sampled_gradients(task, output, (output, output), 0, 5, seed) for seed in (0, 1)]
    assert torch.stack(drawn).unique().numel() == 2 * 6 * 5 * 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [50.0, 1e4])
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", own_cross_entropy])
def test_saturated_outputs_give_finite_numbers(loss, scale, dtype):
    if dtype == torch.bfloat16 and callable(loss):
        pytest.skip("the CPU has no second derivative of it in bfloat16")
    output = (normal(N, 3, scale=scale)).to(dtype)
    output[0] = torch.tensor([scale, -scale, -scale])
    targets = integers(2, N, 3) if loss == "binary_cross_entropy" else integers(3, N)
    task, batch = task_of(loss), (output, targets)
    found = [loss_hessian_roots(task, output, batch), output_hessian_products(task, output, batch, output[None])]
    if not callable(loss):
        found += [true_fisher_roots(task, output, batch), sampled_gradients(task, output, batch, 0, 9, 0)]
    for values in found:
        assert values.dtype == dtype
        assert values.isfinite().all()
    if dtype == torch.float64:
        close(squares(found[0]), dense_hessians(task, output, batch), atol=1e-10)


def test_a_saturated_example_alone_is_not_indefinite():
    output = torch.tensor([[40.0, 0.0, -3.0]], dtype=torch.float64)
    assert loss_hessian_roots(task_of(own_cross_entropy), output, (output, torch.tensor([0]))).isfinite().all()


def test_an_impossible_class_is_never_drawn():
    output = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]] * N, dtype=torch.float64)
    batch = (output, torch.zeros(N, dtype=torch.int64))
    drawn = sampled_gradients(task_of("cross_entropy"), output, batch, 0, 500, 0)
    assert not drawn[..., [1, 3]].any()
    assert drawn[..., 2].unique().numel() == 2
    assert loss_hessian_roots(task_of("cross_entropy"), output, batch).isfinite().all()


def concave_in_one(output, batch):
    return output.square().sum(dim=1) - 3 * batch[1] * output[:, 0].square()


def test_an_indefinite_loss_names_the_row():
    output = normal(N, 3)
    batch = (output, torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64))
    with pytest.raises(IndefiniteLossError, match=r"eigenvalue -4 at row 12.*hessian.*fisher") as raised:
        loss_hessian_roots(task_of(concave_in_one), output, batch, start=10)
    assert raised.value.row == 12
    assert raised.value.eigenvalue == pytest.approx(-4)
    # Its products are defined all the same.
    close(output_hessian_products(task_of(concave_in_one), output, batch, output[None])[0, 2, 0], -4 * output[2, 0])


def test_a_loss_without_second_derivative_at_a_row_names_it():
    output = normal(N, 3)
    output[1] = 0
    with pytest.raises(NonFiniteError, match="row 6"):
        loss_hessian_roots(task_of(lambda out, _: out.square().sum(dim=1).sqrt()), output, (output,), start=5)


def test_a_loss_that_cannot_be_differentiated_twice_is_named():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return 2 * ctx.saved_tensors[0] * gradient

    output = normal(N, 3)
    with pytest.raises(TaskError, match=r'cannot be differentiated twice.*"fisher"'):
        loss_hessian_roots(task_of(lambda out, _: Once.apply(out).sum(dim=1)), output, (output,))


@pytest.mark.parametrize(
    "output", [(torch.zeros(N, 2), 1), {"x": torch.zeros(N)}, torch.zeros(N, 2).long(), torch.zeros(())]
)
def test_other_outputs_are_refused_with_the_remedy(output):
    task, batch = task_of(huber), (torch.zeros(N, 2), torch.zeros(N, 2))
    for call in (
        lambda: loss_hessian_roots(task, output, batch),
        lambda: root_count(task, output),
        lambda: output_hessian_products(task, output, batch, torch.zeros(1, N, 2)),
    ):
        with pytest.raises(TaskError, match="forward="):
            call()


def test_examples_that_are_not_first_are_refused():
    with pytest.raises(TaskError, match=r"\(2, 4\) for a batch of 4 examples.*forward="):
        loss_hessian_roots(task_of(huber), torch.zeros(2, N), (torch.zeros(N, 2), torch.zeros(N, 2)))


def test_losses_without_a_distribution_have_no_true_fisher():
    output = normal(N, 3)
    for call in (
        lambda: true_fisher_roots(task_of(huber), output, (output, output)),
        lambda: true_fisher_shares(task_of(huber), output, (output, output)),
        lambda: sampled_gradients(task_of(huber), output, (output, output), 0, 1, 0),
    ):
        with pytest.raises(TaskError, match=r'huber defines no distribution.*"ggn".*"fisher"'):
            call()


def test_a_wrong_target_or_sample_count_is_refused():
    output = normal(N, 3)
    with pytest.raises(TaskError, match="integer targets"):
        loss_hessian_roots(task_of("cross_entropy"), output, (output, output))
    with pytest.raises(TaskError, match="at least 1, not 0"):
        sampled_gradients(task_of("mse"), output, (output, output), 0, 0, 0)


def test_float32_roots_are_close_to_the_float64_ones():
    task, output, batch = build("squared hinge")
    close(
        squares(loss_hessian_roots(task, output.float(), batch)).double(),
        dense_hessians(task, output, batch),
        rtol=1e-4,
        atol=1e-4,
    )
