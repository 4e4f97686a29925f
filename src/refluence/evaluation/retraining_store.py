"""A folder of retrained models: what was asked for, and a file for each finished group."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from refluence._version import __version__
from refluence.batches import Batches, Data, tensors_of
from refluence.errors import DataError, TaskError
from refluence.evaluation.ground_truth import FILE, GroundTruth
from refluence.task import Task, _name
from refluence.training.callables import callable_digest
from refluence.training.files import read_tensors, write_tensors
from refluence.training.recipe import Recipe

_FORMAT = "refluence retraining 1"
_MANIFEST = "manifest.json"
_STATE = "state/"


def fingerprint(
    task: Task,
    train: Data,
    test: Data,
    masks: Tensor,
    recipe: Recipe | Callable[..., nn.Module],
    build: Callable[[], nn.Module] | None,
) -> dict[str, Any]:
    """All that decides what a retraining measures, by name."""
    frozen = [p for p in task.model.parameters() if not p.requires_grad] if build is None else []
    buffers = _kept_buffers(task.model) if build is None else []
    shapes = [(name, str(p.dtype), tuple(p.shape), p.requires_grad) for name, p in task.model.named_parameters()]
    return {
        **task.describe(),
        "architecture": _digest(str(task.model).encode()),
        "parameters' shapes": _digest(repr(shapes).encode()),
        "frozen parameters": _tensors_digest(frozen),
        "kept buffers": _tensors_digest(buffers),
        "build": "fresh model" if build is None else _name(build),
        **_recipe(recipe),
        "functions and what is bound to them": callable_digest(
            task.loss, task.forward, task.measurement, build, None if isinstance(recipe, Recipe) else recipe
        ),
        "train data": _data_digest(train),
        "test data": _data_digest(test),
        "subsets": list(masks.shape),
        "masks": _tensors_digest([masks]),
        "refluence": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


class RetrainingStore:
    """Finished models of one retraining in a folder.

    Args:
        folder: of the files.
        manifest: what is in its manifest.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self._manifest = folder, manifest

    @staticmethod
    def open(folder: Path, described: Mapping[str, Any]) -> RetrainingStore:
        """A new folder, or one of the same retraining.

        Raises:
            DataError: the folder holds another retraining, naming the first difference, or something else.
        """
        described = json.loads(json.dumps(described))
        if not (folder / _MANIFEST).exists():
            if folder.exists() and not folder.is_dir():
                raise DataError(f"{folder} is a file: give a folder to keep the retrained models in")
            folder.mkdir(parents=True, exist_ok=True)
            store = RetrainingStore(folder, {"format": _FORMAT, "fingerprint": described, "how": {}})
            store._write()
            return store
        store = RetrainingStore.existing(folder)
        kept = store._manifest["fingerprint"]
        for name in kept:  # a folder of an earlier version has fewer names
            if described.get(name) != kept.get(name):
                raise DataError(
                    f"{folder} holds another retraining: its {name} is {kept.get(name)!r}, not "
                    f"{described.get(name)!r}: give another folder, or delete this one"
                )
        return store

    @staticmethod
    def existing(folder: Path) -> RetrainingStore:
        """The retraining that a folder holds.

        Raises:
            DataError: it holds none.
        """
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} holds no retraining: its {_MANIFEST} cannot be read ({error})") from error
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise DataError(f"{folder} holds no retraining of this version ({_FORMAT})")
        return RetrainingStore(folder, manifest)

    @property
    def how(self) -> Mapping[str, Any]:
        """How the models are trained: the groups, whether together, and why."""
        how: dict[str, Any] = self._manifest["how"]
        return how

    def describe(self, how: Mapping[str, Any]) -> None:
        """Note how the models are trained."""
        self._manifest["how"] = json.loads(json.dumps(how))
        self._write()

    def add(self, models: Sequence[int], measured: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
        """Keep what a group's models measured, and their parameters and buffers if any are given."""
        tensors = dict(measured) | {f"{_STATE}{name}": tensor for name, tensor in states.items()}
        name = f"models-{models[0]:05d}-{_digest(repr(list(models)).encode())[:8]}.safetensors"
        write_tensors(self.folder / name, tensors, {"models": json.dumps(list(models))})

    def measurements(self) -> dict[int, dict[str, Tensor]]:
        """Model → name → (k,) of the finished models; damaged files are put away, with a warning."""
        found: dict[int, dict[str, Tensor]] = {}
        for tensors, models in self._groups():
            for k, i in enumerate(models):
                found[i] = {name: values[k] for name, values in tensors.items() if not name.startswith(_STATE)}
        return found

    def finish(self, truth: GroundTruth) -> None:
        """Write the ground truth next to the models, and drop what a kill left of their trainings."""
        truth.save(self.folder / FILE)
        for path in [*self.folder.glob("training-*.safetensors"), *self.folder.glob("*.part")]:
            path.unlink(missing_ok=True)

    def models(self, task: Task) -> list[nn.Module]:
        """The kept models, in eval mode."""
        if not self._manifest["fingerprint"]["keep_models"]:
            raise DataError(f"{self.folder} holds no models: retrain with keep_models=True")
        described = self._manifest["fingerprint"]
        expected = described["subsets"][0] * described["seeds"] + described["baseline"]
        models: dict[int, nn.Module] = {}
        for tensors, indices in self._groups():
            states = {name.removeprefix(_STATE): t for name, t in tensors.items() if name.startswith(_STATE)}
            for k, i in enumerate(indices):
                models[i] = _filled(task, {name: tensor[k] for name, tensor in states.items()})
        if len(models) != expected:
            raise DataError(
                f"{self.folder} holds {len(models)} of {expected} models: run the same retrain call again to finish"
            )
        return [models[i] for i in range(expected)]

    def _groups(self) -> list[tuple[dict[str, Tensor], list[int]]]:
        groups = []
        for path in sorted(self.folder.glob("models-*.safetensors")):
            found = read_tensors(path)
            if found is None:
                warnings.warn(f"{path} is damaged: its models are trained again", stacklevel=4)
                path.unlink()
                continue
            tensors, metadata = found
            groups.append((tensors, [int(i) for i in json.loads(metadata["models"])]))
        return groups

    def _write(self) -> None:
        temporary = self.folder / f".{_MANIFEST}.part"
        temporary.write_text(json.dumps(self._manifest, indent=1))
        temporary.replace(self.folder / _MANIFEST)


def _kept_buffers(model: nn.Module) -> list[Tensor]:
    """The buffers that a `fresh_model` does not draw anew."""
    return [
        buffer
        for module in model.modules()
        if not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        for buffer in module.buffers(recurse=False)
    ]


def _filled(task: Task, state: Mapping[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(task.model)
    own = dict([*model.named_parameters(), *model.named_buffers()])
    if own.keys() != state.keys() or any(own[name].shape != tensor.shape for name, tensor in state.items()):
        raise TaskError(
            f"the kept models have other parameters than the task's model ({type(model).__name__}): give the task "
            "that they were retrained with"
        )
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    return model.eval()


def _recipe(recipe: Recipe | Callable[..., nn.Module]) -> dict[str, Any]:
    if not isinstance(recipe, Recipe):
        return {"recipe": _name(recipe)}
    return {f"recipe's {name}": value for name, value in dataclasses.asdict(recipe).items()}


def _data_digest(data: Data) -> str:
    batches = Batches(data)
    digest = hashlib.sha256(str(batches.n).encode())
    for _, batch in batches:
        for tensor in tensors_of(batch):
            _add(digest, tensor)
    return digest.hexdigest()[:16]


def _tensors_digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        _add(digest, tensor)
    return digest.hexdigest()[:16]


def _add(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape[1:])}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
