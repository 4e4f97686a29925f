"""What must agree for the rows of a store to be those of a fit, and the manifest that says it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from refluence._version import __version__
from refluence.errors import StoreError
from refluence.sketches import Sketch
from refluence.store.bound import bound_digest
from refluence.store.places import Place
from refluence.task import Task

FORMAT_NAME = "refluence-store-"
FORMAT = FORMAT_NAME + "1"
MANIFEST = "manifest.json"
MODEL = "model (weights, buffers, architecture)"


def gradients_fingerprint(task: Task, model: str, groups: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """All that decides the gradient of a row, by name; the row itself is known by its checksum.

    Args:
        task: what is differentiated.
        model: the fingerprint of its model.
        groups: block → parameters.
    """
    described = task.describe()
    return {
        MODEL: model[:32],
        "loss": described["loss"],
        "forward": described["forward"],
        "what loss and forward are bound to": bound_digest(task.loss, task.forward),
        "parameters": {block: list(names) for block, names in groups.items()},
        "version of refluence": __version__,
    }


def sketch_fingerprint(sketch: Sketch) -> dict[str, Any]:
    """The kind of a sketch with its numbers."""
    fields = dataclasses.fields(sketch)  # type: ignore[arg-type]
    numbers = {field.name: getattr(sketch, field.name) for field in fields if field.init}
    return {"kind": type(sketch).__qualname__, **numbers}


def digest(fingerprint: Mapping[str, Any]) -> str:
    """A short hash of a fingerprint, which every shard carries."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:32]


def settle(place: Place, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprint as JSON, which the place's manifest now has.

    Raises:
        StoreError: the place has another fingerprint, with the first difference; or it holds something else.
    """
    ours: dict[str, Any] = json.loads(json.dumps(fingerprint))
    names = place.names()
    if MANIFEST in names:
        theirs = read_manifest(place)
        if (found := first_difference(theirs, ours)) is not None:
            name, there, here = found
            raise StoreError(
                f"the store {place} holds gradients of another {name}: {there} there, {here} here. Give another store "
                "for these, or fit what it was made of"
            )
        return ours
    foreign = [name for name in names if not name.endswith((".zarr.zip", ".part"))]
    if foreign:
        raise StoreError(f"{place} holds {foreign[0]} and no store of gradients: give another folder")
    text = json.dumps({"format": FORMAT, "fingerprint": ours}, indent=1, ensure_ascii=False) + "\n"
    place.write(MANIFEST, text.encode())
    return ours


def read_manifest(place: Place) -> dict[str, Any]:
    """The fingerprint that a place's manifest has.

    Raises:
        StoreError: there is none, it cannot be read, or it is of another format.
    """
    try:
        with place.open(MANIFEST) as file:
            manifest = json.loads(file.read())
    except FileNotFoundError as error:
        raise StoreError(f"{place} holds no store of gradients: it has no {MANIFEST}") from error
    except ValueError as error:
        raise StoreError(
            f"the {MANIFEST} of the store {place} is damaged ({error}): delete it, and the next fit of the same "
            "writes it again and keeps the shards"
        ) from error
    kind = str(manifest.get("format", "")) if isinstance(manifest, dict) else ""
    if not kind.startswith(FORMAT_NAME):
        raise StoreError(f"{place} holds something else than a store of gradients: give another folder")
    if kind != FORMAT:
        raise StoreError(f"the store {place} has format {kind!r}, and this version reads {FORMAT!r}: give another")
    fingerprint: dict[str, Any] = manifest["fingerprint"]
    return fingerprint


def first_difference(there: Any, here: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """(name, value there, value here) of the first value that differs, in the order of `here`; None where all agree."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *(key for key in there if key not in here)]:
            inner = f"{name}: {key}" if name else key
            if (found := first_difference(there.get(key), here.get(key), inner)) is not None:
                return found
        return None
    if isinstance(there, list) and isinstance(here, list) and there != here:
        only = [item for item in there if item not in here], [item for item in here if item not in there]
        return (name, *only) if any(only) else (f"order of {name}", there, here)
    return None if there == here else (name, repr(there), repr(here))
