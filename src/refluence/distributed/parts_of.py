"""Where the train side of a fit lies, and how much memory is there."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from refluence.batches import Batches, Data, tensors_of
from refluence.curvature import Curvature
from refluence.distributed.clients import connected
from refluence.distributed.cluster import check_sendable, cluster_memory, worker_addresses
from refluence.distributed.group_parts import GroupParts, agreed, in_group
from refluence.distributed.recipe import Recipe, Rows, is_loader, stretches
from refluence.errors import ClusterError
from refluence.execution import Execution, parse_bytes
from refluence.gradients.capture import Capture
from refluence.gradients.parts import Parts
from refluence.settings import Settings

if TYPE_CHECKING:
    from distributed import Client

    from refluence.distributed.dask_parts import DaskParts

STRETCHES_PER_WORKER = 4
MOST_ROWS = 16_384
"""Rows of a stretch: what a dying worker loses is at most the work on these."""
SHARE_OF_CLUSTER = 0.6


def budget(execution: Execution, device: torch.device) -> int:
    """Bytes that a fit may use: of all workers together, of the first process of a group, or here."""
    client = connected(execution.cluster)
    if client is None:
        return int(agreed(execution.budget(device)))
    if execution.memory is not None:
        return len(worker_addresses(client)) * parse_bytes(execution.memory)
    return int(SHARE_OF_CLUSTER * cluster_memory(client)) or execution.budget(device)


def workers(execution: Execution) -> int:
    """How many workers or processes share the work."""
    client = connected(execution.cluster)
    if client is None:
        return dist.get_world_size() if in_group() else 1
    return len(worker_addresses(client))


def elsewhere(execution: Execution) -> bool:
    """Whether the train side lies in parts."""
    return execution.cluster is not None or in_group()


def parts_of(recipe: Recipe, capture: Capture, batches: Batches, memory: float) -> Parts | None:
    """The parts that a fit's execution asks for, or that its process group has; None: all is made here.

    Args:
        recipe: of the train side.
        capture, batches: of this process.
        memory: bytes of gradients that may be kept here.

    Raises:
        ClusterError: no workers, or data that are too large to be sent to them.
    """
    execution = recipe.settings.execution
    if execution.cluster is not None:
        return on_cluster(recipe, batches)
    if not in_group():
        return None
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = _shared(batches, world)
    part: Curvature = recipe.curvature(capture, batches.stretch(*rows[rank]), memory)
    return GroupParts(part, rows)


def _shared(batches: Batches, world: int) -> list[Rows]:
    """One stretch for each process.

    Raises:
        ClusterError: fewer batches than processes.
    """
    count = len(batches)
    if count < world:
        raise ClusterError(
            f"the {batches.n} train rows are {count} batches of {batches.batch_size}, too few for {world} processes: "
            f"use a smaller batch_size"
        )
    ends = [(i * count // world) * batches.batch_size for i in range(world + 1)]
    return [(first, min(stop, batches.n)) for first, stop in pairwise(ends)]


def on_cluster(recipe: Recipe, batches: Batches) -> DaskParts:
    """The parts on the workers of the cluster that the recipe's execution names.

    Raises:
        ClusterError: no workers, or data that are too large to be sent to them.
    """
    from refluence.distributed.dask_parts import DaskParts

    settings = recipe.settings
    client = connected(settings.execution.cluster)
    assert client is not None
    return DaskParts(client, sendable(recipe), cut(client, settings, batches), settings.progress)


def cut(client: Client, settings: Settings, batches: Batches) -> list[Rows]:
    """The stretches: several for each worker, so that none waits long for another, and none too long to lose."""
    wanted = settings.execution.shard_rows
    if wanted is None:
        wanted = min(MOST_ROWS, -(-batches.n // (STRETCHES_PER_WORKER * len(worker_addresses(client)))))
    return stretches(batches.n, batches.batch_size, wanted)


def sendable(recipe: Recipe) -> Recipe:
    """The recipe as it goes to the workers.

    Raises:
        ClusterError: data in memory that are too large to be sent.
    """
    if not is_loader(recipe.data):
        check_sendable(_size(recipe.data), "the train data")
    execution = recipe.settings.execution
    execution = replace(execution, cluster=None, shard_rows=execution.shard_rows if execution.store else None)
    return replace(recipe, settings=replace(recipe.settings, execution=execution, progress=False))


def _size(data: Data) -> int:
    tensors: list[Tensor] = tensors_of(data)
    if tensors:
        return sum(tensor.nbytes for tensor in tensors)
    import cloudpickle

    return len(cloudpickle.dumps(data))
