"""Mixed derivatives of the values of examples, in their inputs and in the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refluence.batches import Batch, tree_map
from refluence.errors import TaskError
from refluence.gradients.functional import Objective
from refluence.gradients.second_order import second_order

CHUNK = 32


def differentiable_input(batch: Batch) -> Tensor:
    """The one floating-point input of a batch: itself, its first element, or a mapping's one such entry but "labels".

    Raises:
        TaskError: integer inputs, or several candidates.
    """
    if isinstance(batch, Mapping):
        named = {key: value for key, value in batch.items() if key != "labels" and isinstance(value, Tensor)}
        floating = [key for key, value in named.items() if value.is_floating_point()]
        if len(floating) > 1:
            raise TaskError(
                f"the batch has several floating-point inputs, {', '.join(map(str, floating))}: give `inputs` as a "
                "function that returns the one to differentiate, such as lambda batch: batch[name]"
            )
        return named[floating[0]] if floating else _floating(next(iter(named.values()), None))
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (tuple, list, Mapping)):
        return differentiable_input(batch[0])
    return _floating(batch[0] if isinstance(batch, (tuple, list)) and batch else batch)


def mixed_products(
    model: nn.Module,
    objective: Objective,
    names: Sequence[str],
    batch: Batch,
    directions: Float[Tensor, "k d"],
    inputs: Callable[[Batch], Tensor] = differentiable_input,
    chunk: int = CHUNK,
) -> Float[Tensor, "k n ..."]:
    """∂/∂x_j [s_iᵀ ∇_θ ℓ_j] for every direction i and example j, of shape (k, n, *x.shape).

    Args:
        model: in eval mode, with the parameters `names` requiring grad; it is left as it is.
        objective: ℓ, the values (n,) of a batch.
        names: the parameters θ, in the order of the directions' d columns.
        directions: s, one a row.
        inputs: which tensor of the batch is x.
        chunk: how many directions are differentiated together; the memory grows with it.

    Raises:
        TaskError: inputs that have no derivative, or a model or loss that has no second derivative.
    """
    x = _floating(inputs(batch))
    own = dict(model.named_parameters())
    parameters = [own[name] for name in names]
    directions = directions.detach().to(parameters[0])
    along = [
        part.reshape(-1, *parameter.shape)
        for part, parameter in zip(directions.split([p.numel() for p in parameters], dim=1), parameters, strict=True)
    ]
    with second_order(model), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        # A clone of the leaf, because a model may write into what it is given.
        value = objective(model, _replaced(batch, x, leaf.clone())).sum()
        found = torch.zeros(len(directions), *leaf.shape, dtype=leaf.dtype, device=leaf.device)
        try:
            slopes = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
            pairs = [(g, s) for g, s in zip(slopes, along, strict=True) if g is not None and g.requires_grad]
            if pairs:
                gradients, vectors = zip(*pairs, strict=True)
                _fill(found, gradients, leaf, vectors, chunk)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise TaskError(
                f"the derivative of the gradients of {type(model).__name__} in its inputs needs a second derivative "
                f"that one of its operations has not ({error}): write that operation with others that have"
            ) from error
    return found


def _floating(x: Any) -> Tensor:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x
    got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
    raise TaskError(
        f"the inputs to differentiate are {got}, which have no derivative: of tokens, give their embeddings as a "
        "floating-point input (`forward=` that starts after the embedding), or return the one with a derivative by "
        "`inputs`"
    )


def _replaced(batch: Batch, old: Tensor, new: Tensor) -> Batch:
    """The batch with its first occurrence of `old` as `new`: targets that are the inputs stay constant."""
    left = [new]
    return tree_map(lambda tensor: left.pop() if tensor is old and left else tensor, batch)


def _fill(found: Tensor, gradients: Sequence[Tensor], leaf: Tensor, vectors: Sequence[Tensor], chunk: int) -> None:
    """Write the derivatives of ⟨gradients, vectors⟩ in the leaf, one for each first index of the vectors."""
    batched = True
    for start in range(0, len(found), chunk):
        stretch = slice(start, min(start + chunk, len(found)))
        if batched:
            try:
                columns = [vector[stretch] for vector in vectors]
                (some,) = torch.autograd.grad(
                    gradients, leaf, columns, retain_graph=True, is_grads_batched=True, allow_unused=True
                )
                if some is not None:
                    found[stretch] = some
                continue
            except RuntimeError:
                batched = False  # an operation whose second derivative has no batching rule
        for i in range(stretch.start, stretch.stop):
            columns = [vector[i] for vector in vectors]
            (some,) = torch.autograd.grad(gradients, leaf, columns, retain_graph=True, allow_unused=True)
            if some is not None:
                found[i] = some
