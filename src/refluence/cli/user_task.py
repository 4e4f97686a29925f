"""Loading the function that `--task` names."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import typer

from refluence.errors import DataError, RefluenceError

_HINT = "--task"


def load_function(text: str) -> Callable[[], Any]:
    """The function that `package.module:function` or `path/to/file.py:function` names.

    The working folder is importable, and the folder of the file.

    Raises:
        typer.BadParameter: no such module, file or function.
        DataError: the module fails while it is imported.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise typer.BadParameter(
            f"{text!r} is not of the form package.module:function or path/to/file.py:function", param_hint=_HINT
        )
    module = _from_file(Path(place)) if place.endswith(".py") else _from_name(place)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise typer.BadParameter(
            f"{place} has no function {name!r}; it has {', '.join(sorted(functions)) or 'none'}", param_hint=_HINT
        )
    return function


def call(function: Callable[[], Any], text: str) -> Any:
    """What the user's function returns.

    Raises:
        DataError: the function raised; names the error and the line.
    """
    try:
        return function()
    except RefluenceError:
        raise
    except Exception as error:
        raise DataError(f"{text} raised {_where(error)}; --debug shows the traceback") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {path} (from {Path.cwd()})", param_hint=_HINT)
    path = path.resolve()
    _importable(path.parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # as for an ordinary import, so that what the file defines can be pickled and its source found
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        raise DataError(f"{path} cannot be imported: {_where(error)}; --debug shows the traceback") from error
    # a worker of a cluster has no such module, and is sent what it defines
    with contextlib.suppress(ImportError):
        import cloudpickle

        cloudpickle.register_pickle_by_value(module)
    return module


def _from_name(name: str) -> ModuleType:
    _importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise DataError(f"{name} cannot be imported: {_where(error)}; --debug shows the traceback") from error
        raise typer.BadParameter(f"there is no module {name!r} (from {Path.cwd()})", param_hint=_HINT) from error
    except Exception as error:
        raise DataError(f"{name} cannot be imported: {_where(error)}; --debug shows the traceback") from error


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (line {frames[-1].lineno} of {frames[-1].filename})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
