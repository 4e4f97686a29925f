"""Products of the Hessian and the Gauss–Newton matrix of one batch with many vectors, without per-example gradients.

Forward-over-reverse, `vmap(jvp(grad))`: torch's `jvp(jacrev)` gives a wrong Hessian of affine normalisation layers.
Where an operation has no forward derivative, or `torch.func` cannot follow the model, double backward.

Source: B. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 1994; N. Schraudolph, Fast
curvature matrix-vector products for second-order gradient descent, Neural Computation 2002.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from refluence.batches import Batch
from refluence.curvature.outputs import output_hessian_products, root_count
from refluence.errors import TaskError
from refluence.gradients.functional import Objective
from refluence.gradients.second_order import second_order
from refluence.task import Task

Weights = Float[Tensor, " n"] | None
Vectors = Mapping[str, Float[Tensor, "k ..."]]
Products = dict[str, Float[Tensor, "k ..."]]


class _Called(nn.Module):
    """A function of a model as a module, so that `functional_call` can put other parameters under it."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Batch], Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: Batch) -> Any:
        return self.function(self.model, batch)


def hessian_products(
    model: nn.Module,
    objective: Objective,
    names: Sequence[str],
    batch: Batch,
    weights: Weights,
    vectors: Vectors,
    chunk: int,
) -> Products:
    """Σ_i w_i ∇²ℓ_i v in the parameters `names`, the others held constant: name → (k, *shape).

    Args:
        model: in eval mode, with the parameters `names` requiring grad; it is left as it is.
        objective: ℓ, the values (n,) of a batch.
        weights: w; None is 1 for every example.
        vectors: name → (k, *shape of the parameter).
        chunk: how many vectors go through the model together; the memory grows with it.

    Raises:
        TaskError: a model or loss that has no second derivative.
    """
    chosen, call = _functional(model, objective, names, batch)

    def total(parameters: dict[str, Tensor]) -> Tensor:
        return _weighted(call(parameters), weights).sum()

    def product(vector: dict[str, Tensor]) -> dict[str, Tensor]:
        return jvp(grad(total), (chosen,), (vector,))[1]

    vectors = _like(chosen, vectors)
    with second_order(model), torch.enable_grad():
        try:
            return _by_chunks(_vectorised(product), vectors, chunk)
        except RuntimeError:
            return _hessian_by_double_backward(model, objective, batch, weights, vectors)


def gauss_newton_products(
    model: nn.Module,
    task: Task,
    names: Sequence[str],
    batch: Batch,
    weights: Weights,
    vectors: Vectors,
    chunk: int,
) -> Products:
    """Σ_i w_i J_iᵀ (∇²_out ℓ_i) J_i v in the parameters `names`, the others held constant: name → (k, *shape).

    J is the Jacobian of the output in the parameters. Arguments as for `hessian_products`.

    Raises:
        TaskError: an output that is not one floating-point tensor, or a model or loss without the derivatives.
    """
    chosen, call = _functional(model, task.output, names, batch)

    def curved(output: Tensor, tangents: Tensor) -> Tensor:
        return _weighted(output_hessian_products(task, output, batch, tangents).movedim(0, -1), weights).movedim(-1, 0)

    def products(columns: dict[str, Tensor]) -> dict[str, Tensor]:
        tangents = _vectorised(lambda vector: jvp(call, (chosen,), (vector,))[1])(columns)
        return _vectorised(lambda cotangent: backward(cotangent)[0])(curved(output, tangents))

    vectors = _like(chosen, vectors)
    with second_order(model), torch.enable_grad():
        try:
            output, backward = vjp(call, chosen)[:2]
            root_count(task, output)  # for its error where the output is not one tensor
            return _by_chunks(products, vectors, chunk)
        except RuntimeError:
            return _gauss_newton_by_double_backward(model, task, batch, vectors, curved)


def output_products(
    model: nn.Module, task: Task, names: Sequence[str], batch: Batch, vectors: Vectors, chunk: int
) -> Float[Tensor, "k n ..."]:
    """J_i v for every example: how the output moves, to first order, where the parameters `names` move by v.

    Arguments as for `hessian_products`.

    Raises:
        TaskError: an output that is not one floating-point tensor, or a model without the derivatives.
    """
    chosen, call = _functional(model, task.output, names, batch)
    vectors = _like(chosen, vectors)
    every = _vectorised(lambda vector: jvp(call, (chosen,), (vector,))[1])
    with second_order(model), torch.enable_grad():
        try:
            root_count(task, call(chosen))  # for its error where the output is not one tensor
            return torch.cat([every(part).detach() for part in _chunks(vectors, chunk)])
        except RuntimeError:
            with _named(model, "derivative of the output", "scores, which need one derivative only"):
                output, pushed = _pushed(model, task, batch, list(vectors))
                parts = [[column[0] for column in part.values()] for part in _chunks(vectors, 1)]
                return torch.stack([pushed(part) for part in parts]).to(output)


def _functional(
    model: nn.Module, function: Callable[[nn.Module, Batch], Any], names: Sequence[str], batch: Batch
) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Any]]:
    """The chosen parameters, and `function` of the model and the batch as a function of them."""
    called = _Called(model, function)
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    # Constants are detached too, for else their graph would be kept with every product.
    constants = {f"model.{name}": parameter for name, parameter in own.items() if name not in set(names)}

    def call(parameters: dict[str, Tensor]) -> Any:
        return functional_call(
            called, constants | {f"model.{name}": value for name, value in parameters.items()}, (batch,)
        )

    return {name: own[name] for name in names}, call


def _like(chosen: Mapping[str, Tensor], vectors: Vectors) -> Products:
    """The vectors of the chosen parameters in their dtypes, on their devices."""
    return {name: vectors[name].detach().to(parameter) for name, parameter in chosen.items()}


def _weighted(values: Float[Tensor, "n ..."], weights: Weights) -> Float[Tensor, "n ..."]:
    if weights is None:
        return values
    return values * weights.to(values).reshape(-1, *[1] * (values.ndim - 1))


def _vectorised(function: Callable) -> Callable:
    """`function` over the first dimension; random numbers that a model draws are those of a single call."""

    def every(columns: Any) -> Any:
        with warnings.catch_warnings():
            # What vmap has no batching rule for it runs one by one: slower, and right.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return vmap(function, randomness="same")(columns)

    return every


def _by_chunks(function: Callable[[Products], Products], vectors: Products, chunk: int) -> Products:
    """`function` of at most `chunk` of the k vectors at a time."""
    found = {name: torch.zeros_like(vector, memory_format=torch.contiguous_format) for name, vector in vectors.items()}
    start = 0
    for part in _chunks(vectors, chunk):
        stretch = slice(start, start := start + chunk)
        for name, product in function(part).items():
            found[name][stretch] = product.detach()
    return found


def _chunks(vectors: Products, chunk: int) -> Iterator[Products]:
    """At most `chunk` of the k vectors at a time."""
    for start in range(0, next(iter(vectors.values())).shape[0], chunk):
        yield {name: vector[start : start + chunk] for name, vector in vectors.items()}


@contextmanager
def _named(model: nn.Module, what: str, others: str) -> Iterator[None]:
    """An error that says what is left where a model has not the derivatives."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise TaskError(
            f"the {what} of {type(model).__name__} needs a derivative that one of its operations has not ({error}): "
            f"use {others}"
        ) from error


def _gradients(of: Sequence[Tensor], at: Sequence[Tensor], along: Sequence[Tensor | None], graph: bool) -> list[Tensor]:
    """Σ ⟨along, ∂of/∂at⟩ for each of `at`, zero where nothing depends on it; the graph of `of` is kept."""
    pairs = [(value, vector) for value, vector in zip(of, along, strict=True) if value.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in at]
    values, vectors = zip(*pairs, strict=True)
    found = torch.autograd.grad(values, at, vectors, retain_graph=True, create_graph=graph, allow_unused=True)
    return [torch.zeros_like(leaf) if one is None else one for one, leaf in zip(found, at, strict=True)]


def _hessian_by_double_backward(
    model: nn.Module, objective: Objective, batch: Batch, weights: Weights, vectors: Products
) -> Products:
    own = dict(model.named_parameters())
    leaves = [own[name] for name in vectors]
    total = _weighted(objective(model, batch), weights).sum()

    def product(columns: Products) -> Products:
        found = _gradients(slopes, leaves, [column[0] for column in columns.values()], graph=False)
        return {name: one[None] for name, one in zip(columns, found, strict=True)}

    with _named(model, "Hessian", 'the curvature "ggn" or "fisher"'):
        slopes = _gradients([total], leaves, [None], graph=True)
        return _by_chunks(product, vectors, 1)


def _gauss_newton_by_double_backward(
    model: nn.Module, task: Task, batch: Batch, vectors: Products, curved: Callable[[Tensor, Tensor], Tensor]
) -> Products:
    own = dict(model.named_parameters())
    leaves = [own[name] for name in vectors]

    def product(columns: Products) -> Products:
        tangent = pushed([column[0] for column in columns.values()])
        found = _gradients([output], leaves, [curved(output, tangent[None])[0]], graph=False)
        return {name: one[None] for name, one in zip(columns, found, strict=True)}

    with _named(model, "Gauss–Newton matrix", 'the curvature "fisher"'):
        output, pushed = _pushed(model, task, batch, list(vectors))
        return _by_chunks(product, vectors, 1)


def _pushed(
    model: nn.Module, task: Task, batch: Batch, names: Sequence[str]
) -> tuple[Tensor, Callable[[Sequence[Tensor]], Tensor]]:
    """The output with its graph, and v ↦ J v by two backward passes."""
    own = dict(model.named_parameters())
    output = task.output(model, batch)
    root_count(task, output)
    dual = torch.zeros_like(output, requires_grad=True)
    # Jᵀu is linear in u, so that J v is the derivative of ⟨Jᵀu, v⟩ in u.
    pulled = _gradients([output], [own[name] for name in names], [dual], graph=True)
    return output, lambda vector: _gradients(pulled, [dual], list(vector), graph=False)[0]
