"""A fit as a folder: how it was made, the solver's tensors and the training data; nothing in it is unpickled.

    fit.json           format, settings, solver, damping, blocks, fingerprints, versions
    state.safetensors  what the solver's state exports, and the spectra that are known
    train.pt           the training batches as one tree of tensors, and the weights

The model is not written: `load` takes the task again and refuses another one.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from refluence import fitting
from refluence._version import __version__
from refluence.accuracy import Accuracy
from refluence.batches import Batches, tree_map
from refluence.columns import checked_weights
from refluence.curvature import OuterCurvature
from refluence.distributed.group_parts import writes, written
from refluence.errors import DataError, PlanError, RefluenceError
from refluence.execution import usable_device
from refluence.fitting import Fit
from refluence.influence import Influence
from refluence.planning import ASSUMED_TESTS
from refluence.records import from_record, to_record
from refluence.settings import model_fingerprint, working_model
from refluence.task import Task
from refluence.theory import SpectralMeasure

FORMAT_NAME = "refluence-fit-"
FORMAT = FORMAT_NAME + "1"
RECORD, STATE, TRAIN = "fit.json", "state.safetensors", "train.pt"
_PACKAGES = ("refluence", "torch", "numpy", "scipy", "safetensors")


def save(influence: Influence, path: Path) -> Path:
    """Write a fit, beside the folder first and then moved there; a fit that is there is replaced.

    Raises:
        DataError: the folder holds something else, or batches that are no one tree of tensors.
        RefluenceError: the model changed since the fit, or a solver of your own, which no record can name.
    """
    fit = influence._fitted()
    check_folder(path)
    if model_fingerprint(fit.model) != fit.fingerprint:
        raise RefluenceError("the model's parameters or buffers changed since fit: fit again before saving")
    tensors, transposed = _packed(_state_tensors(fit))
    record = {**_record(influence), "transposed": transposed}
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    train = {"data": _whole(fit.rows.batches), "weights": fit.curvature.weights}
    if writes():
        _write(path, text, tensors, train)
    written()
    return path


def _write(path: Path, text: str, tensors: dict[str, Tensor], train: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        new, old = beside / "new", beside / "old"
        new.mkdir()
        (new / RECORD).write_text(text, encoding="utf-8")
        save_file(tensors, new / STATE)
        torch.save(tree_map(Tensor.cpu, train), new / TRAIN)
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_folder(path: Path) -> None:
    """Raise a DataError if something else than a fit is there; nothing is written."""
    if path.exists() and not _holds_fit(path) and not (path.is_dir() and not any(path.iterdir())):
        raise DataError(f"{path} exists and holds no fit: choose another path")


def load(path: Path, task: Task) -> Influence:
    """The fit that `save` wrote, on the task that it was made of; only the measurement may be another.

    A device that this machine lacks is replaced by the model's own, with a warning.

    Raises:
        DataError: no fit there, one of another format, or damaged files.
        RefluenceError: another model, loss, forward, choice of parameters or l2.
    """
    record = _read_record(path)
    _check_task(record["task"], task)
    dtype = record["dtype"]
    influence = Influence(
        task,
        curvature=record["curvature"],
        solver=from_record(record["solver_asked"]),
        damping=from_record(record["damping_choice"]),
        blocks={block: [glob.escape(name) for name in names] for block, names in record["blocks"].items()},
        device=_device(record["device"]),
        dtype=None if dtype is None else _dtype(dtype),
        batch_size=record["batch_size_asked"],
        progress=record["progress"],
        seed=record["seed"],
        samples=record["samples"],
        accuracy=None if record.get("accuracy") is None else Accuracy(**record["accuracy"]),
    )
    settings = dataclasses.replace(
        influence.settings, solver=from_record(record["solver"]), batch_size=record["batch_size"]
    )
    if model_fingerprint(working_model(settings)) != record["model_fingerprint"]:
        raise RefluenceError(
            f"the model is not the one of the fit in {path}: its parameters, buffers or architecture differ. Load the "
            "weights that the fit was made with"
        )
    train = _read(path / TRAIN, lambda file: torch.load(file, weights_only=True))
    prepared = fitting.prepare(settings, train["data"], ASSUMED_TESTS)
    if prepared.batches.checksum != record["train_fingerprint"]:
        raise DataError(f"{path / TRAIN} holds other rows than the fit was made with: the file was changed")
    weights = None if train["weights"] is None else checked_weights(train["weights"], prepared.batches.n)
    curvature = prepared.curvature(settings, weights, record["q"])
    tensors = _read(path / STATE, load_file)
    tensors = {
        name: (tensor.T if name in set(record["transposed"]) else tensor).to(curvature.device)
        for name, tensor in tensors.items()
    }
    if spectra := _under("spectrum/", tensors):
        curvature.known_spectra = {block: SpectralMeasure(*rows.cpu().numpy()) for block, rows in spectra.items()}
    solver: Any = settings.solver
    state = solver.restore(curvature, _under("state/", tensors))
    state.diagnostics = {**record["diagnostics"], **state.diagnostics}
    plan = dataclasses.replace(prepared.plan, reason=record["reason"])
    skipped = {int(row): reason for row, reason in record.get("skipped_rows", {}).items()}
    fit = Fit(prepared.capture.model, prepared.capture, curvature, state, plan, record["model_fingerprint"], skipped)
    influence._take(fit, record["damping"])
    return influence


def _record(influence: Influence) -> dict[str, Any]:
    fit, settings = influence._fitted(), influence.settings
    dtype = settings.dtype
    return {
        "format": FORMAT,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}},
        "refluence": __version__,
        "task": influence.task.describe(),
        "curvature": settings.curvature,
        "q": fit.curvature.q if isinstance(fit.curvature, OuterCurvature) else None,
        "samples": settings.samples,
        "seed": settings.seed,
        "solver": to_record(fit.plan.chosen.solver),
        "solver_asked": to_record(settings.solver),
        "reason": fit.plan.reason,
        "accuracy": None if settings.accuracy is None else dataclasses.asdict(settings.accuracy),
        "damping_choice": to_record(influence._damping_choice),
        "damping": influence._dampings(),
        "blocks": {block: list(names) for block, names in influence.groups.items()},
        "device": None if settings.device is None else str(settings.device),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "batch_size": fit.rows.batches.batch_size,
        "batch_size_asked": settings.batch_size,
        "progress": settings.progress,
        "n_train": influence.n_train,
        "model_fingerprint": fit.fingerprint,
        "train_fingerprint": fit.rows.batches.checksum,
        "skipped_rows": {str(row): reason for row, reason in fit.skipped.items()},
        "diagnostics": fit.state.diagnostics,
    }


def _state_tensors(fit: Fit) -> dict[str, Tensor]:
    tensors = {f"state/{name}": tensor for name, tensor in fit.state.export().items()}
    # An estimated spectrum takes many products, and every manifest asks for the effective dimension.
    for block, measure in (fit.curvature.known_spectra or {}).items():
        tensors[f"spectrum/{block}"] = torch.from_numpy(np.stack([measure.values, measure.counts]))
    return tensors


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _packed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(contiguous tensors with a memory of their own, names of those written as their transpose).

    A product depends in its last digits on the strides, so they come back as they were.
    """
    packed: dict[str, Tensor] = {}
    transposed: list[str] = []
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        if tensor.ndim == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous():
            transposed.append(name)
            tensor = tensor.T
        tensor = tensor.contiguous()
        memory = tensor.untyped_storage().data_ptr()
        packed[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return packed, transposed


def _whole(batches: Batches) -> Any:
    """All batches as one tree of tensors on the CPU, as the gradients were made from them."""
    whole = _joined([tree_map(lambda tensor: tensor.detach().cpu(), batch) for _, batch in batches])
    # A list of anything but columns would be read as a data set of samples.
    return tuple(whole) if isinstance(whole, list) else whole


def _joined(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        if len(shapes := {(tuple(part.shape[1:]), part.dtype) for part in parts}) > 1:
            raise DataError(
                f"the training batches have tensors of different shapes or types, {sorted(map(str, shapes))}, so they "
                "are no one data set that can be written: pad the rows to one length"
            )
        return torch.cat(list(parts))
    if isinstance(first, Mapping) and all(isinstance(key, (str, int)) for key in first):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, (tuple, list)) and not hasattr(first, "_fields") and len({len(part) for part in parts}) == 1:
        joined = [_joined(column) for column in zip(*parts, strict=True)]
        return joined if isinstance(first, list) else tuple(joined)
    if (first is None or isinstance(first, (bool, int, float, str))) and all(part == first for part in parts):
        return first
    raise DataError(
        f"the training batches hold a {type(first).__name__} that cannot be written without pickling: give batches of "
        "tensors in tuples, lists and dicts"
    )


def _read_record(path: Path) -> dict[str, Any]:
    if not _holds_fit(path):
        raise DataError(f"{path} holds no fit: it should be a folder that Influence.save wrote")
    record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    if record["format"] != FORMAT:
        raise DataError(
            f"{path} has format {record['format']!r}, this version of refluence reads {FORMAT!r}: load it with "
            f"refluence {record.get('refluence')}, or fit again"
        )
    return dict(record)


def _holds_fit(path: Path) -> bool:
    """Whether a folder is what `save` wrote, in this or another format version."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and str(record.get("format", "")).startswith(FORMAT_NAME)


def _read(file: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(file)
    except Exception as error:
        # Neither library says which errors a damaged file can raise.
        raise DataError(f"{file} cannot be read ({type(error).__name__}: {error}): save the fit again") from error


def _check_task(stored: Mapping[str, Any], task: Task) -> None:
    given = task.describe()
    for name in ("model", "loss", "forward", "parameters", "l2"):
        if given[name] == stored[name]:
            continue
        was, now = stored[name], given[name]
        if name == "parameters":
            changed = sorted(set(was) ^ set(now)) or [a for a, b in zip(was, now, strict=True) if a != b]
            other = "only in the fit's" if changed[0] in was else "not in the fit's"
            raise RefluenceError(f"the task's parameters differ from those of the fit: {changed[0]!r} is {other}")
        raise RefluenceError(
            f"the task's {name} is {now!r}, but the fit was made with {was!r}: give the task that it was made of "
            "(functions are compared by their name and source)"
        )


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise DataError(f"the fit names the dtype {name!r}, which torch {torch.__version__} does not have")
    return dtype


def _device(name: str | None) -> str | None:
    if name is None:
        return None
    try:
        usable_device(name)
    except PlanError:
        warnings.warn(f"the fit was made on {name!r}, which is not here: the model's device is used", stacklevel=3)
        return None
    return name
