"""What an `Influence` was asked for, and the model that it works with."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from refluence.accuracy import Accuracy, check_accuracy
from refluence.curvature.build import CURVATURES
from refluence.damping import DampingChoice
from refluence.errors import RefluenceError
from refluence.execution import Execution
from refluence.gradients.routes import Groups
from refluence.solvers import Solver
from refluence.task import Task


@dataclass(frozen=True)
class Settings:
    """What an `Influence` was asked for."""

    task: Task
    curvature: str
    solver: Solver | str
    damping: DampingChoice
    groups: Groups
    device: torch.device | str | None
    dtype: torch.dtype | None
    batch_size: int | None
    progress: bool
    seed: int
    samples: int
    execution: Execution
    accuracy: Accuracy | None = None

    def __post_init__(self) -> None:
        if self.curvature not in CURVATURES:
            raise RefluenceError(
                "curvature must be "
                + ", ".join(f'"{name}"' for name in CURVATURES[:-1])
                + f' or "{CURVATURES[-1]}", not {self.curvature!r}'
            )
        if not isinstance(self.samples, int) or isinstance(self.samples, bool) or self.samples < 1:
            raise RefluenceError(f"samples must be an integer of at least 1, not {self.samples!r}")
        check_accuracy(self.accuracy, self.solver, self.curvature)


def working_model(settings: Settings) -> nn.Module:
    """The task's model, or a copy of it where device or dtype ask for another."""
    model = settings.task.model
    parameters = list(model.parameters())
    device = torch.device(settings.device) if settings.device is not None else parameters[0].device
    moved = any(p.device != torch.empty(0, device=device).device for p in parameters)
    if moved or (settings.dtype is not None and any(p.dtype != settings.dtype for p in parameters)):
        return copy.deepcopy(model).to(device=device, dtype=settings.dtype)
    return model


def model_fingerprint(model: nn.Module) -> str:
    """A hash of the architecture as printed and of every parameter and buffer."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
