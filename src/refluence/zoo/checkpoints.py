"""Trained models in the cache: one safetensors file each, named by a fingerprint of all that made it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from refluence._version import __version__
from refluence.files import replacing
from refluence.training import Recipe
from refluence.zoo.datasets import Pair
from refluence.zoo.fit import Fit
from refluence.zoo.folders import checkpoint_folder

State = dict[str, Tensor]
_FORMAT = 2


@dataclass(frozen=True)
class Training:
    """What determines a trained model: names, layout and task, the recipe, the seed, the data, the kind of device."""

    dataset: str
    model: str
    architecture: str
    task: Mapping[str, Any]
    recipe: Recipe
    seed: int
    data: str
    device: str = "cpu"

    @property
    def fingerprint(self) -> str:
        """A hash of this training, of the versions of refluence and torch, and of the file format."""
        made_by = {"refluence": __version__, "torch": torch.__version__, "format": _FORMAT}
        return hashlib.sha256(json.dumps([dataclasses.asdict(self), made_by], sort_keys=True).encode()).hexdigest()

    @property
    def path(self) -> Path:
        """The file of its checkpoint in the cache, which need not exist."""
        return checkpoint_folder() / f"{self.dataset}-{self.model}-{self.fingerprint[:16]}.safetensors"


@dataclass(frozen=True)
class Measured:
    """How well a trained model does on its train rows and on some test rows, which are known by their hash."""

    train: Fit
    test: Fit
    test_data: str


def architecture(model: nn.Module) -> str:
    """The modules of a model with their settings, and the shapes of its parameters and buffers."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return f"{model}\n{shapes}"


def data_hash(data: Pair) -> str:
    """SHA-256 of shapes, types and values of inputs and targets; about 0.7 GB/s."""
    return tensors_hash({"inputs": data[0], "targets": data[1]})


def tensors_hash(tensors: State) -> str:
    """SHA-256 of names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(training: Training, model: nn.Module, measured: Measured) -> Path:
    """Write the checkpoint of a training in one step, so that a reader never sees half of it; returns its path.

    A tied weight is written once, under its first name.
    """
    path = training.path
    values = model.state_dict()
    state = {name: values[name].detach().cpu().contiguous() for name in dict.fromkeys(_first_names(model).values())}
    metadata = {
        "fingerprint": training.fingerprint,
        "sha256": tensors_hash(state),
        "training": json.dumps(dataclasses.asdict(training), sort_keys=True),
        "measured": json.dumps(dataclasses.asdict(measured)),
        "refluence": __version__,
        "torch": torch.__version__,
    }
    with replacing(path) as temporary:
        save_file(state, temporary, metadata=metadata)
    return path


def load_into(model: nn.Module, training: Training) -> Measured | None:
    """Fill a model from the checkpoint of a training, put it in eval mode, and give what was measured of it.

    None where there is no checkpoint, or (with a warning) a damaged one.
    """
    path = training.path
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("fingerprint") != training.fingerprint or metadata.get("sha256") != tensors_hash(state):
            raise ValueError("its contents do not match its checksum")
        found = json.loads(metadata["measured"])
        model.load_state_dict({name: state[first] for name, first in _first_names(model).items()})
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        warnings.warn(f"checkpoint {path} is damaged ({error}): training again", stacklevel=2)
        return None
    model.eval()
    return Measured(Fit(**found["train"]), Fit(**found["test"]), found["test_data"])


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of the model's state with the first name of the same tensor: another one only for tied weights."""
    first: dict[tuple[Any, ...], str] = {}
    names = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else (name,)
        names[name] = first.setdefault(place, name)
    return names
