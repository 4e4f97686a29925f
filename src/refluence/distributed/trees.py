"""Trees of tensors, brought to a device or taken apart."""

from __future__ import annotations

from copy import copy as shallow
from typing import Any

import torch
from torch import Tensor

from refluence.gradients.parts import Tree


def moved(tree: Tree, device: torch.device, copy: bool = False) -> Tree:
    """The tree with its tensors on a device, those in the library's own objects too."""
    if isinstance(tree, Tensor):
        return tree.to(device, copy=copy)
    if isinstance(tree, dict):
        found = {key: moved(value, device, copy) for key, value in tree.items()}
        return tree if all(found[key] is value for key, value in tree.items()) else found
    if isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields"):
        items = [moved(value, device, copy) for value in tree]
        return tree if all(a is b for a, b in zip(items, tree, strict=True)) else type(tree)(items)
    if type(tree).__module__.startswith("refluence.") and hasattr(tree, "__dict__"):
        found = {name: moved(value, device, copy) for name, value in vars(tree).items()}
        if all(found[name] is value for name, value in vars(tree).items()):
            return tree
        other = shallow(tree)
        vars(other).update(found)
        return other
    return tree


def leaves(tree: Tree) -> list[Any]:
    """Everything that is no dict, list or tuple, in order."""
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


def with_leaves(tree: Tree, values: list[Any]) -> Tree:
    """The tree with other leaves, taken from the front of a list."""
    if isinstance(tree, dict):
        return {key: with_leaves(value, values) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(with_leaves(value, values) for value in tree)
    return values.pop(0)
