"""What a user's function is: its source, and the values that are bound to it."""

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


def callable_digest(*things: Any) -> str:
    """A hash of functions by source, partial arguments, defaults and closures, the same in every process.

    Of other objects with `__call__` the class and the attributes, of modules the architecture; what a function reads
    from its module is not seen.
    """
    return hashlib.sha256("\n".join(_text(thing, ()) for thing in things).encode()).hexdigest()[:16]


def _text(thing: Any, inside: tuple[int, ...]) -> str:
    if isinstance(thing, _PLAIN):
        return repr(thing)
    if id(thing) in inside:
        return "itself"
    inside = (*inside, id(thing))
    if isinstance(thing, (Tensor, np.ndarray)):
        return _array(thing)
    if isinstance(thing, nn.Module):
        return str(thing)
    if isinstance(thing, Mapping):
        return f"{{{','.join(sorted(f'{_text(k, inside)}:{_text(v, inside)}' for k, v in thing.items()))}}}"
    if isinstance(thing, (tuple, list)):
        return f"({','.join(_text(item, inside) for item in thing)})"
    if isinstance(thing, functools.partial):
        return f"partial{_text((thing.func, thing.args, thing.keywords), inside)}"
    if isinstance(thing, types.MethodType):
        return f"method{_text((thing.__func__, thing.__self__), inside)}"
    if isinstance(thing, types.FunctionType):
        bound = [_content(cell) for cell in thing.__closure__ or ()]
        return f"{_source(thing)}{_text((thing.__defaults__, thing.__kwdefaults__, bound), inside)}"
    kind = type(thing)
    own = "" if isinstance(thing, type) or not callable(thing) else _text(getattr(thing, "__dict__", {}), inside)
    return f"{_source(thing if isinstance(thing, type) else kind)}{own}"


def _array(array: Tensor | np.ndarray) -> str:
    values = array.detach().cpu().contiguous() if isinstance(array, Tensor) else np.ascontiguousarray(array)
    data = values.reshape(-1).view(torch.uint8).numpy() if isinstance(values, Tensor) else values
    return f"{array.dtype}{tuple(array.shape)}{hashlib.sha256(data.tobytes()).hexdigest()}"


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _source(thing: Any) -> str:
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    try:
        return f"{name}\n{inspect.getsource(thing)}"
    except (OSError, TypeError):
        return name
