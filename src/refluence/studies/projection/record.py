"""Settings with a record of what the numbers depend on: a folder of results goes on only with the same record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar, TypeVar

R = TypeVar("R", bound="Recorded")


class Recorded:
    """A dataclass of settings, and of parts that are such dataclasses themselves.

    `UNRECORDED` names the fields that change no number.
    """

    UNRECORDED: ClassVar[tuple[str, ...]] = ()

    def record(self) -> dict[str, Any]:
        """All that the numbers depend on, JSON-able and flat: fields by their names, parts by those of their own."""
        found: dict[str, Any] = {}
        for name, value in self._values().items():
            if isinstance(value, Recorded):
                found |= value.record()
            elif name not in self.UNRECORDED:
                found[name] = list(value) if isinstance(value, tuple) else value
        return found

    def with_values(self: R, given: Mapping[str, Any]) -> R:
        """The same with the values that are given for its fields and its parts' by name; other names are left out."""
        changed = {
            name: value.with_values(given) if isinstance(value, Recorded) else given.get(name, value)
            for name, value in self._values().items()
        }
        return replace(self, **changed)  # type: ignore[type-var]

    def _values(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
