"""Passes over training data that lie in parts: what is summed over rows, and what has a value for each row.

A pass is a module-level function `f(part, *given)` of a part's curvature or gradients. Its result is a tree: a tensor,
a number, None, a `Summed`, or a dict, list or tuple of trees. Without parts a pass is the plain call on the whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Pass = Callable[..., Any]
Tree = Any


@runtime_checkable
class Summed(Protocol):
    """What adds itself to another of its kind, in place or not."""

    def add(self, other: Any) -> Any:
        """The sum."""
        ...


class Parts(ABC):
    """Stretches of the training data, each where its gradients are made: on workers, or in processes of a group.

    `of` names what of a part's curvature the pass takes: "" itself, "rows" or "features".
    """

    @abstractmethod
    def total(self, of: str, function: Pass, *given: Any) -> Tree:
        """Σ over the parts of function(part, *given), in the order of the rows."""

    @abstractmethod
    def by_row(self, of: str, function: Pass, *given: Any) -> Tree:
        """function(part, *given), whose tensors have a row for each of the part's, one part below the other."""

    @abstractmethod
    def gram(self, of: str, function: Pass, groups: Sequence[str]) -> dict[str, Tensor]:
        """Group → (N, N): function(part, other, groups) of every pair of parts, half of them made and mirrored."""


def taken(part: Any, of: str) -> Any:
    """What of a part's curvature a pass takes."""
    return getattr(part, of) if of else part


def added(total: Tree, more: Tree) -> Tree:
    """The sum of two trees, which may be made in the first; None where either is None; keys of either are in it."""
    if total is None or more is None:
        return None
    if isinstance(total, Tensor):
        return total.add_(more)
    if isinstance(total, (int, float)):
        return total + more
    if isinstance(total, dict):
        return {
            key: added(total[key], more[key]) if key in total and key in more else {**total, **more}[key]
            for key in [*total, *(k for k in more if k not in total)]
        }
    if isinstance(total, (list, tuple)):
        return type(total)(added(a, b) for a, b in zip(total, more, strict=True))
    assert isinstance(total, Summed)
    return total.add(more)


def joined(trees: Sequence[Tree]) -> Tree:
    """The tensors of equal trees below one another."""
    first = trees[0]
    if isinstance(first, Tensor):
        return torch.cat(list(trees))
    if isinstance(first, dict):
        return {key: joined([tree[key] for tree in trees]) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(joined([tree[i] for tree in trees]) for i in range(len(first)))
    assert first is None
    return None
