"""Which parameters share a block of a block-diagonal curvature."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from torch import nn

from refluence.errors import RefluenceError

Blocks = str | Mapping[str, Sequence[str]]


def parameter_groups(model: nn.Module, names: Sequence[str], blocks: Blocks) -> dict[str, tuple[str, ...]]:
    """Block → its parameters, every attributed parameter in exactly one.

    Args:
        model: whose modules own the parameters.
        names: the attributed parameters, in the model's order.
        blocks: "full" (one block), "module" (the parameters that a module owns itself), "parameter", or
            {block: names or globs}.

    Raises:
        RefluenceError: an unknown word or name, or a parameter in no block or in two.
    """
    if isinstance(blocks, str):
        if blocks == "full":
            return {"full": tuple(names)}
        if blocks == "parameter":
            return {name: (name,) for name in names}
        if blocks == "module":
            groups: dict[str, list[str]] = {}
            for name in names:
                groups.setdefault(name.rpartition(".")[0] or "(root)", []).append(name)
            return {group: tuple(members) for group, members in groups.items()}
        raise RefluenceError(f'blocks must be "full", "module", "parameter" or a dict, not {blocks!r}')
    order = {name: i for i, name in enumerate(names)}
    chosen: dict[str, tuple[str, ...]] = {}
    owner: dict[str, str] = {}
    for block, patterns in blocks.items():
        members: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = fnmatch.filter(names, pattern)
            if not found:
                raise RefluenceError(
                    f"block {block!r} names {pattern!r}, which is no attributed parameter: {list(names)}"
                )
            members |= set(found)
        for name in members:
            if name in owner:
                raise RefluenceError(f"parameter {name!r} is in blocks {owner[name]!r} and {block!r}: put it in one")
            owner[name] = block
        chosen[block] = tuple(sorted(members, key=order.__getitem__))
    if missing := [name for name in names if name not in owner]:
        raise RefluenceError(
            f"parameters {missing} are in no block: add them to one, or leave them out with Task(parameters=...)"
        )
    return chosen
