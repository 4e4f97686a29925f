"""What must hold of a model and its objective before per-example gradients mean anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from refluence.batches import rows_of, slice_rows
from refluence.errors import NonDeterministicError, RefluenceError, TaskError
from refluence.gradients.agreement import tolerance
from refluence.gradients.functional import Objective
from refluence.gradients.recording import note_rows

MIXES = (
    "the model or the loss mixes the examples of a batch (batch statistics, a mean over the batch, a "
    "contrastive term). Influence needs one loss per example"
)


def check_independent(model: nn.Module, objective: Objective, batch: Any, data: str, what: str) -> None:
    """Refuse an objective whose value for an example depends on the other examples of its batch.

    Raises:
        TaskError: with the row and both values.
    """
    try:
        together = objective(model, batch).detach()
    except Exception as error:
        note_rows(error, batch, 0, data, lambda part: objective(model, part))
        raise
    for i in range(rows_of(batch)):
        try:
            alone = objective(model, slice_rows(batch, i, i + 1)).detach()[0]
        except RefluenceError:
            raise
        except (ValueError, RuntimeError) as error:
            raise TaskError(
                f"the {what} of {data} row {i} fails alone ({error}) but is {together[i].item():.6g} in a batch: "
                f"{MIXES}"
            ) from error
        # NaN is left to the pass over the gradients, which names its row.
        near = tolerance(alone.dtype)
        if not torch.isclose(together[i], alone, rtol=near, atol=near, equal_nan=True):
            raise TaskError(
                f"the {what} of {data} row {i} is {alone.item():.6g} alone but {together[i].item():.6g} in a batch: "
                f"{MIXES}"
            )


def check_deterministic(model: nn.Module, objective: Objective, batch: Any) -> None:
    """Refuse a model whose forward pass in eval mode is random.

    Raises:
        NonDeterministicError: naming the first module whose output differs between two passes.
    """
    outputs: list[list[tuple[str, Tensor]]] = []
    for _ in range(2):
        seen: list[tuple[str, Tensor]] = []
        outputs.append(seen)
        hooks = [
            module.register_forward_hook(
                lambda _m, _i, out, name=name, seen=seen: (
                    seen.append((name, out.detach().clone())) if isinstance(out, Tensor) else None
                )
            )
            for name, module in model.named_modules()
            if not isinstance(module, torch.jit.ScriptModule)
        ]
        try:
            with torch.no_grad():
                seen.append(("the loss", objective(model, batch)))
        except Exception as error:
            note_rows(error, batch, 0, "train", lambda part: objective(model, part))
            raise
        finally:
            for hook in hooks:
                hook.remove()
    for (name, first), (_, second) in zip(*outputs, strict=False):
        same = first.shape == second.shape and torch.allclose(
            first.double() if first.is_floating_point() else first,
            second.double() if second.is_floating_point() else second,
            rtol=tolerance(first.dtype),
            atol=tolerance(first.dtype),
            equal_nan=True,
        )
        if not same:
            kind = dict(model.named_modules()).get(name)
            what = f"module {name or 'model'!r} ({type(kind).__name__})" if kind is not None else name
            raise NonDeterministicError(
                f"{what} gave two different outputs in two equal passes in eval mode; the randomness is in it or just "
                "before it. Remove it (functional dropout without training=self.training, sampled noise), or seed "
                "it by the input"
            )
