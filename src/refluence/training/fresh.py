"""A model of the same architecture with new initial parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from refluence.errors import TaskError


def fresh_model(model: nn.Module) -> nn.Module:
    """A deep copy of `model` with its trainable parameters and their modules' buffers drawn anew.

    Every module draws its own by `reset_parameters()`, in the model's order, from the CPU's global random state.
    Parameters that do not require grad keep their values.

    Raises:
        TaskError: a module has trainable parameters of its own and no `reset_parameters`.
    """
    copied = copy.deepcopy(model)
    device = next(iter(parameter.device for parameter in model.parameters()), torch.device("cpu"))
    copied.to("cpu")
    with torch.no_grad():
        for name, module in copied.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if not any(parameter.requires_grad for parameter in own.values()):
                continue
            reset: Callable[[], object] | None = getattr(module, "reset_parameters", None) or getattr(
                module, "_reset_parameters", None
            )
            if reset is None:
                raise TaskError(
                    f"module {name or 'the model itself'!r} ({type(module).__name__}) has parameters of its own "
                    f"({', '.join(own)}) and no reset_parameters(), so it cannot be drawn anew: give `build`, a "
                    "function that makes an untrained model"
                )
            frozen = {key: parameter.clone() for key, parameter in own.items() if not parameter.requires_grad}
            reset()
            for key, value in frozen.items():
                own[key].copy_(value)
    return copied.to(device)
