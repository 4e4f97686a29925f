"""A hash of what a user's functions compute with: their sources and every value that is bound to them."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_VALUES = (*_PLAIN, Tensor, np.ndarray, nn.Module, Mapping, list, tuple, set, frozenset)


def bound_digest(*things: Any) -> str:
    """A hash of functions and objects, the same in every process unless something that they compute with differs.

    Of a function the source, defaults, closure, and what it reads from its module: numbers, words, tensors, modules
    with their weights, containers of these, functions of the same package. Of an object its class and attributes.
    """
    digest = hashlib.sha256()
    _add(digest, things, {})
    return digest.hexdigest()[:16]


def _add(digest: Any, thing: Any, seen: dict[int, Any]) -> None:
    if isinstance(thing, _PLAIN):
        digest.update(f"{thing!r};".encode())
        return
    if id(thing) in seen:
        return
    seen[id(thing)] = thing  # held, so that no other thing takes its id
    digest.update(f"{type(thing).__qualname__}(".encode())
    if isinstance(thing, (Tensor, np.ndarray)):
        _add_array(digest, thing)
    elif isinstance(thing, nn.Module):
        digest.update(repr(thing).encode())
        _add(digest, dict(thing.state_dict()), seen)
        for module in thing.modules():
            _add(digest, {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}, seen)
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            _add(digest, key, seen)
            _add(digest, value, seen)
    elif isinstance(thing, (set, frozenset)):
        digest.update(repr(sorted(map(repr, thing))).encode())
    elif isinstance(thing, (tuple, list)):
        for item in thing:
            _add(digest, item, seen)
    elif isinstance(thing, functools.partial):
        _add(digest, (thing.func, thing.args, thing.keywords), seen)
    elif isinstance(thing, types.MethodType):
        _add(digest, (thing.__func__, thing.__self__), seen)
    elif isinstance(thing, types.FunctionType):
        digest.update(_source(thing).encode())
        cells = [cell.cell_contents for cell in thing.__closure__ or () if cell != types.CellType()]
        _add(digest, (thing.__defaults__, thing.__kwdefaults__, cells, _read(thing)), seen)
    else:
        digest.update(_source(thing if isinstance(thing, type) else type(thing)).encode())
        if not isinstance(thing, (type, types.ModuleType, types.BuiltinFunctionType)):
            _add(digest, dict(getattr(thing, "__dict__", {})), seen)
    digest.update(b")")


def _read(function: types.FunctionType) -> dict[str, Any]:
    """What a function reads from its module."""
    package = function.__module__.partition(".")[0]
    names, codes = set(), [function.__code__]
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    found = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    return {name: value for name, value in found.items() if isinstance(value, _VALUES) or _within(value, package)}


def _within(value: Any, package: str) -> bool:
    return isinstance(value, types.FunctionType) and value.__module__.partition(".")[0] == package


def _add_array(digest: Any, array: Tensor | np.ndarray) -> None:
    digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
    if isinstance(array, Tensor):
        array = array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest.update(np.ascontiguousarray(array).tobytes())


def _source(thing: Any) -> str:
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    try:
        return f"{name}\n{inspect.getsource(thing)}"
    except (OSError, TypeError):
        code = getattr(thing, "__code__", None)
        return (
            name
            if code is None
            else f"{name}\n{code.co_code.hex()}{[c for c in code.co_consts if isinstance(c, _PLAIN)]}"
        )
