"""Configurations of the library as JSON-able records, {"type": name, field: value…}, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from refluence import damping, sketches, solvers
from refluence.errors import DataError
from refluence.solvers import preconditioners

TYPE = "type"
BY_NAME = "by name"
_HOMES: dict[str, ModuleType] = {
    "solvers": solvers,
    "preconditioners": preconditioners,
    "sketches": sketches,
    "damping": damping,
}


def to_record(value: Any) -> Any:
    """A number, a word, None, a sequence or a dict of these, or a frozen dataclass of the library.

    Raises:
        DataError: anything else.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [to_record(item) for item in value]
    if isinstance(value, Mapping):
        return {TYPE: BY_NAME, BY_NAME: {str(key): to_record(item) for key, item in value.items()}}
    for name, kind in _known().items():
        if type(value) is kind:
            fields = [field.name for field in dataclasses.fields(kind) if field.init]
            return {TYPE: name, **{field: to_record(getattr(value, field)) for field in fields}}
    raise DataError(
        f"{type(value).__module__}.{type(value).__name__} cannot be written: only solvers, preconditioners, sketches "
        "and dampings of refluence itself can be named in a file"
    )


def from_record(record: Any) -> Any:
    """What `to_record` wrote; sequences come back as tuples.

    Raises:
        DataError: a name that this version does not have, or other fields.
    """
    if isinstance(record, list):
        return tuple(from_record(item) for item in record)
    if not isinstance(record, dict):
        return record
    name = record.get(TYPE)
    if name == BY_NAME:
        return {key: from_record(item) for key, item in record[BY_NAME].items()}
    known = _known()
    if name not in known:
        raise DataError(f"the record names {name!r}, which this version of refluence does not have")
    given = {key: from_record(item) for key, item in record.items() if key != TYPE}
    try:
        return known[name](**given)
    except TypeError as error:
        raise DataError(f"the record of {name} has other fields than this version of refluence: {error}") from error


def _known() -> dict[str, type]:
    """Name → class; the only ones that a record can make."""
    return {
        f"{home}.{name}": kind
        for home, module in _HOMES.items()
        for name, kind in vars(module).items()
        if isinstance(kind, type)
        and dataclasses.is_dataclass(kind)
        and (kind.__module__ == module.__name__ or name in getattr(module, "__all__", ()))
    }
