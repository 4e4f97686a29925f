"""Before models are trained together: is the traced step right, and how much memory does a model take?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from refluence.batches import Batch, tensors_of, tree_map
from refluence.task import Task
from refluence.training.randomness import Draws, OwnDropout
from refluence.training.tracing import CannotTrainTogetherError, MeanLoss, Stacked, StackedStep

AGREEMENT = 1e-2


def checked_step(
    task: Task, model: nn.Module, stacked: Stacked, batch: Batch, seeds: Sequence[int]
) -> tuple[StackedStep, dict[str, tuple[int, ...]]]:
    """A traced step, and the strides in which its gradients come, which suit the parameters best.

    The gradients and buffers of the first and the last model are compared with those of a plain backward pass.

    Raises:
        CannotTrainTogetherError: a model that `vmap` cannot follow, or follows to something else.
    """
    step = StackedStep(task, model, stacked, batch)
    copies = stacked.clone()
    _, gradients = step(copies, batch, [Draws(seed) for seed in seeds])
    for i in {0, stacked.count - 1}:
        _compare(task, model, stacked, batch, i, seeds[i], gradients, copies)
    strides = {name: gradient.stride() for name, gradient in zip(stacked.trained, gradients, strict=True)}
    try:
        step(laid_out(stacked, strides), batch, [Draws(seed) for seed in seeds])
    except RuntimeError:  # a view of a parameter that its new strides do not allow
        strides = {name: tensor.stride() for name, tensor in stacked.trained.items()}
    return step, strides


def laid_out(stacked: Stacked, strides: dict[str, tuple[int, ...]]) -> Stacked:
    """A copy with the trained parameters in the given strides, so that no gradient has to be transposed."""
    trained = {
        name: torch.empty_strided(tensor.shape, strides[name], dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        for name, tensor in stacked.trained.items()
    }
    return replace(stacked.clone(), trained=trained)


def bytes_of_a_model(task: Task, model: nn.Module, batch: Batch, copies: int) -> int:
    """Bytes for one model's training step: `copies` of what is trained, what a backward pass keeps, and the batch."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    trial = copy.deepcopy(model)
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        MeanLoss(task, trial)(batch)
    others = (*trial.parameters(), *trial.buffers(), *tensors_of(batch))
    own = {tensor.untyped_storage().data_ptr() for tensor in others}
    activations = sum(size for pointer, size in kept.items() if pointer not in own)
    trained = sum(parameter.nbytes for parameter in trial.parameters() if parameter.requires_grad)
    return copies * trained + 2 * activations + sum(tensor.nbytes for tensor in tensors_of(batch))


def _compare(
    task: Task,
    model: nn.Module,
    stacked: Stacked,
    batch: Batch,
    i: int,
    seed: int,
    gradients: Sequence[Tensor],
    after: Stacked,
) -> None:
    alone = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in [*alone.named_parameters(), *alone.named_buffers()]:
            for kind in (stacked.trained, stacked.frozen, stacked.buffers):
                if name in kind:
                    tensor.copy_(kind[name][i])
    trained = [parameter for parameter in alone.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), OwnDropout(Draws(seed))():
        loss = MeanLoss(task, alone)(tree_map(lambda tensor: tensor[i], batch))
        expected = torch.autograd.grad(loss, trained, materialize_grads=True)
    for name, mine, own in zip(stacked.trained, gradients, expected, strict=True):
        _agree(mine[i], own, f"the gradient of {name}")
    for name, buffer in alone.named_buffers():
        if buffer.is_floating_point():
            _agree(after.buffers[name][i], buffer, f"the buffer {name} after a step")


def _agree(together: Tensor, alone: Tensor, what: str) -> None:
    scale = float(alone.norm())
    difference = float((together - alone).norm())
    if difference > AGREEMENT * scale + 1e-6:
        raise CannotTrainTogetherError(
            f"{what} is another one under torch.func.vmap than alone: they differ by {difference:.2g} of {scale:.2g}"
        )
