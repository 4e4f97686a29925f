"""Trained models in the cache: one safetensors file each, named by a fingerprint of all that made it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from refluence._version import __version__
from refluence.zoo.datasets import Pair
from refluence.zoo.folders import checkpoint_folder
from refluence.zoo.training import Recipe

State = dict[str, Tensor]
_FORMAT = 1


@dataclass(frozen=True)
class Training:
    """What determines a trained model: the names, the recipe, the seed and the data."""

    dataset: str
    model: str
    architecture: str
    recipe: Recipe
    seed: int
    data: str

    @property
    def fingerprint(self) -> str:
        """A hash of this training, of the versions of refluence and torch, and of the file format."""
        made_by = {"refluence": __version__, "torch": torch.__version__, "format": _FORMAT}
        return hashlib.sha256(json.dumps([dataclasses.asdict(self), made_by], sort_keys=True).encode()).hexdigest()

    @property
    def path(self) -> Path:
        """The file of its checkpoint in the cache, which need not exist."""
        return checkpoint_folder() / f"{self.dataset}-{self.model}-{self.fingerprint[:16]}.safetensors"


def data_hash(data: Pair) -> str:
    """SHA-256 of shapes, types and values of inputs and labels."""
    return tensors_hash({"inputs": data[0], "labels": data[1]})


def tensors_hash(tensors: State) -> str:
    """SHA-256 of names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save(training: Training, model: nn.Module, *, test_accuracy: float, train_loss: float) -> Path:
    """Write the checkpoint of a training in one step, so that a reader never sees half of it; returns its path."""
    path = training.path
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {
        "fingerprint": training.fingerprint,
        "sha256": tensors_hash(state),
        "training": json.dumps(dataclasses.asdict(training), sort_keys=True),
        "test_accuracy": repr(test_accuracy),
        "train_loss": repr(train_loss),
        "refluence": __version__,
        "torch": torch.__version__,
    }
    handle, temporary = tempfile.mkstemp(suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        save_file(state, temporary, metadata=metadata)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def load_into(model: nn.Module, training: Training) -> bool:
    """Fill a model from the checkpoint of a training; False where there is none, or (with a warning) a damaged one."""
    path = training.path
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("fingerprint") != training.fingerprint or metadata.get("sha256") != tensors_hash(state):
            raise ValueError("its contents do not match its checksum")
        model.load_state_dict(state)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        warnings.warn(f"checkpoint {path} is damaged ({error}): training again", stacklevel=2)
        return False
    model.eval()
    return True
