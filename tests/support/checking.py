"""The checker of types and shapes in signatures, and how many of a function's calls it looks at."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

# An int is taken where a float is meant, as type checkers do.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))

FIRST, EVERY = 8, 11
"""Of a function's calls in one test the first 8 are checked, and then one in 11, a prime, so that no rhythm hides any.

Checking takes ten times as long as a product of the tests' tiny matrices, and solvers take thousands of the same shape.
"""

calls: Counter[str] = Counter()
_jaxtyped = jaxtyping.jaxtyped


def sampling(thing: Any = None, /, *, typechecker: Any) -> Any:
    """`jaxtyping.jaxtyped`, for some of the calls of a function."""
    if thing is None:
        return functools.partial(sampling, typechecker=typechecker)
    if not inspect.isfunction(thing):
        return _jaxtyped(thing, typechecker=typechecker)
    name = f"{thing.__module__}.{thing.__qualname__}"

    @functools.wraps(thing)
    def called(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        calls[name] = count = calls[name] + 1
        function = whole() if count <= FIRST or count % EVERY == 0 else thing
        return function(*args, **kwargs)

    # Functions inside functions are made again and again, and most are called once: making the check takes longer.
    whole: Callable[[], Callable] = functools.cache(lambda: _jaxtyped(thing, typechecker=typechecker))
    return called
