"""Parts in the processes of a torch.distributed group, which all make the same calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from refluence.curvature import Curvature
from refluence.distributed.recipe import Rows
from refluence.distributed.trees import leaves, moved, with_leaves
from refluence.gradients.kernels import held_blocks
from refluence.gradients.parts import Parts, Pass, Tree, added, taken


def in_group() -> bool:
    """Whether this process is one of several of an initialised group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agreed(value: Any) -> Any:
    """The value of the first process, in all of them; the value itself outside a group."""
    if not in_group():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def writes() -> bool:
    """Whether this process writes what all of a group have: the first one does."""
    return not in_group() or dist.get_rank() == 0


def written() -> None:
    """Wait until the process that writes has done so."""
    if in_group():
        dist.barrier()


class GroupParts(Parts):
    """One stretch of the rows in each process of the default group.

    Sums are one all-reduce of each tensor, values by row one all-gather; with NCCL the tensors stay on the GPUs. An
    error in one process is raised in all.

    Args:
        part: the curvature of this process's rows.
        rows: the stretches of all processes, in the order of their ranks.
    """

    def __init__(self, part: Curvature, rows: Sequence[Rows]) -> None:
        self.part, self.rows = part, list(rows)

    def total(self, of: str, function: Pass, *given: Any) -> Tree:
        """The sum over the processes."""
        mine, others = self._shared(function, of, given, structure=True)
        if any(other != others[0] for other in others):
            # Not every process has the same terms, as a layer that its rows do not use.
            return _gathered_sum(mine)
        values = []
        for leaf in leaves(mine):
            if isinstance(leaf, Tensor):
                total = leaf.contiguous().clone()
                dist.all_reduce(total)
                values.append(total)
            else:
                values.append(_gathered_sum(leaf))
        return with_leaves(mine, values)

    def by_row(self, of: str, function: Pass, *given: Any) -> Tree:
        """What the processes give, one below the other."""
        mine, _ = self._shared(function, of, given, structure=False)
        return with_leaves(mine, [None if leaf is None else _below(leaf) for leaf in leaves(mine)])

    def gram(self, of: str, function: Pass, groups: Sequence[str]) -> dict[str, Tensor]:
        """Every pair of stretches: each process multiplies its rows with those that the earlier ones send."""
        rank, world = dist.get_rank(), dist.get_world_size()
        rows, own = taken(self.part, of), {}
        for sender in range(world):
            held = [moved(held_blocks(rows, groups), torch.device("cpu")) if rank == sender else None]
            dist.broadcast_object_list(held, src=sender)
            if rank >= sender:
                other = None if rank == sender else moved(held[0], self.part.device)
                own[sender] = function(rows, other, list(groups))
        found: dict[str, Tensor] = {}
        for group in groups:
            strip = torch.cat([own[sender][group] for sender in sorted(own)], dim=1)
            width = rows.batches.whole * rows.q
            padded = torch.zeros(len(strip), width, dtype=strip.dtype, device=strip.device)
            padded[:, : strip.shape[1]] = strip
            lower = _below(padded)
            start = 0
            for first, stop in self.rows:
                count = rows.q * (stop - first)
                lower[:start, start : start + count] = lower[start : start + count, :start].T
                start += count
            found[group] = lower
        return found

    def _shared(self, function: Pass, of: str, given: tuple[Any, ...], structure: bool) -> tuple[Tree, list[Any]]:
        """This process's result and the structures of all, or the first error in all processes."""
        mine, error = None, None
        try:
            mine = function(taken(self.part, of), *given)
        except Exception as raised:
            error = raised
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (error, _structure(mine) if structure else None))
        if error is not None:
            raise error
        for other, _ in outcomes:
            if other is not None:
                raise other
        return mine, [shape for _, shape in outcomes]


def _structure(tree: Tree) -> Any:
    if isinstance(tree, dict):
        return {key: _structure(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_structure(value) for value in tree]
    return (tuple(tree.shape), str(tree.dtype)) if isinstance(tree, Tensor) else type(tree).__name__


def _gathered_sum(tree: Tree) -> Tree:
    """The sum of trees of any kind, sent as objects."""
    device = next((leaf.device for leaf in leaves(tree) if isinstance(leaf, Tensor)), torch.device("cpu"))
    trees: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(trees, moved(tree, torch.device("cpu")))
    total = trees[0]
    for other in trees[1:]:
        total = added(total, other)
    return moved(total, device)


def _below(rows: Tensor) -> Tensor:
    """The processes' rows below one another."""
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, len(rows))
    most = max(counts)
    # Collectives take tensors of one shape.
    padded = rows.new_zeros((most, *rows.shape[1:]))
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded)
    return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])
