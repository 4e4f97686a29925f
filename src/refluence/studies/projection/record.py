"""Settings with a record of what the numbers depend on: a folder of results goes on only with the same record."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar


class Recorded:
    """A dataclass of settings, and of parts that are such dataclasses themselves.

    `UNRECORDED` names the fields that change no number.
    """

    UNRECORDED: ClassVar[tuple[str, ...]] = ()

    def record(self) -> dict[str, Any]:
        """All that the numbers depend on, JSON-able and flat: fields by their names, parts by those of their own."""
        found: dict[str, Any] = {}
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if isinstance(value, Recorded):
                found |= value.record()
            elif each.name not in self.UNRECORDED:
                found[each.name] = value
        return found
