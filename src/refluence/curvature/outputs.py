"""A loss as a function of the model's output: roots of its Hessian and of its Fisher, and products with the Hessian.

Every function takes (task, output, batch) where the output is one floating-point tensor (n, ...), the examples first.
o is the number of outputs of an example, T_i the number of its targets that count, p the probabilities.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from refluence.batches import Batch, rows_of
from refluence.curvature.output_forms import IndefiniteLossError, distribution_of, form_of
from refluence.errors import TaskError
from refluence.sketches.random_bits import mix, non_negative, random_bits
from refluence.task import Task

__all__ = [
    "IndefiniteLossError",
    "loss_hessian_roots",
    "output_hessian_products",
    "root_count",
    "sampled_gradients",
    "true_fisher_roots",
    "true_fisher_shares",
]

UNIFORM_BITS = 52
LABEL_STREAM = 0x6C6162656C73


def loss_hessian_roots(task: Task, output: Any, batch: Batch, start: int = 0) -> Float[Tensor, "n q *out"]:
    """s with Σ_q s_iq s_iqᵀ = ∇²_out ℓ_i for every example i, in the dtype of the output; q = `root_count`.

    cross_entropy: √(1/T_i) √p_c (e_c − p) for each position and class, zeros where no target counts; mse: √(2/o) I;
    binary_cross_entropy: √(p(1−p)/o) I; any other loss: √λ_q v_q of the eigenvectors of its Hessian by autodiff.

    Args:
        start: the first example's row in its data set, for error messages.

    Raises:
        TaskError: an output that is not one floating-point tensor, or a loss that has no second derivative.
        IndefiniteLossError: a loss whose Hessian in the output has an eigenvalue that is negative beyond rounding.
        NonFiniteError: NaN or Inf in that Hessian.
    """
    return form_of(task).roots(_checked(task, output, batch), batch, start)


def true_fisher_roots(task: Task, output: Any, batch: Batch) -> Float[Tensor, "n q *out"]:
    """f with Σ_q f_iq f_iqᵀ = E[(∂ℓ_i/∂out)(∂ℓ_i/∂out)ᵀ] over labels drawn from the model's own distribution.

    ℓ_i is the mean over the example's targets, and labels are independent given the output. cross_entropy:
    (1/T_i) √p_c (e_c − p) for each position and class; binary_cross_entropy: (1/o) √(p(1−p)) I; mse, the Gaussian with
    density ∝ exp(−ℓ), of variance o/2 in each output: √(2/o) I, the root of the Hessian.

    Raises:
        TaskError: an output that is not one floating-point tensor, or a loss that defines no distribution.
    """
    form = distribution_of(task)
    return form.fisher_roots(_checked(task, output, batch), batch)


def true_fisher_shares(task: Task, output: Any, batch: Batch) -> Float[Tensor, " n"]:
    """Each example's true Fisher over its GGN: 1/T_i for a mean of T_i losses of independent labels, 1 for mse.

    Raises:
        TaskError: an output that is not one floating-point tensor, or a loss that defines no distribution.
    """
    form = distribution_of(task)
    return form.fisher_shares(_checked(task, output, batch), batch)


def sampled_gradients(
    task: Task, output: Any, batch: Batch, start: int, samples: int, seed: int
) -> Float[Tensor, "n samples *out"]:
    """∂ℓ_i/∂out at labels drawn from the model's own distribution, divided by √samples.

    Σ_s f_is f_isᵀ is an unbiased estimate of the true Fisher in the output. The label of an output is a function of
    (seed, row = start + i, sample, index in the example), so it does not depend on how the data is batched; longer
    padding adds labels and changes none.

    Raises:
        TaskError: an output that is not one floating-point tensor, a loss that defines no distribution, samples < 1.
    """
    if samples < 1:
        raise TaskError(f"the number of sampled labels must be at least 1, not {samples}")
    form = distribution_of(task)
    output = _checked(task, output, batch)
    uniforms = _uniforms(seed, start, output.shape[0], samples, form.labels(output), output.device)
    return form.sampled(output, batch, uniforms) / samples**0.5


def output_hessian_products(
    task: Task, output: Any, batch: Batch, tangents: Float[Tensor, "k n *out"]
) -> Float[Tensor, "k n *out"]:
    """∇²_out ℓ_i u for each example's slice of k tangents, without the Hessian.

    Raises:
        TaskError: an output that is not one floating-point tensor, or a loss that has no second derivative.
    """
    return form_of(task).products(_checked(task, output, batch), batch, tangents)


def root_count(task: Task, output: Any) -> int:
    """The number q of columns an example that `loss_hessian_roots` and `true_fisher_roots` give: the outputs o."""
    return _tensor(task, output).shape[1:].numel()


def _tensor(task: Task, output: Any) -> Tensor:
    if isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 0:
        return output.detach()
    got = f"{output.dtype} of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    raise TaskError(
        f"the curvature of the loss in the output needs one floating-point tensor (n, ...) as the output of "
        f'{type(task.model).__name__}; it is {got}: give `forward=` to select it, or use the curvature "fisher"'
    )


def _checked(task: Task, output: Any, batch: Batch) -> Tensor:
    """The output without its graph, once it fits the batch."""
    tensor, n = _tensor(task, output), rows_of(batch)
    if tensor.shape[0] != n:
        raise TaskError(
            f"the output of {type(task.model).__name__} has shape {tuple(tensor.shape)} for a batch of {n} examples: "
            "give `forward=` that returns the examples in the first dimension"
        )
    # For what the built-in losses ask of outputs and targets.
    task.losses(tensor.clone(), batch)
    return tensor


def _uniforms(
    seed: int, start: int, n: int, samples: int, labels: int, device: torch.device
) -> Float[Tensor, "n samples labels"]:
    """Uniform numbers in the open interval (0, 1), each a function of (seed, row, sample, label) alone."""
    bits = random_bits(seed, LABEL_STREAM, start, n, device)[:, None, None]
    for count, shape in ((samples, (1, -1, 1)), (labels, (1, 1, -1))):
        bits = mix(bits + torch.arange(count, device=device).reshape(shape))
    kept = non_negative(bits) >> (62 - UNIFORM_BITS)
    return (kept.double() + 0.5) * 2.0**-UNIFORM_BITS
