"""What a cluster has: workers, threads, memory, and room for what is sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refluence.distributed.placement import slots
from refluence.errors import ClusterError
from refluence.execution import format_bytes

if TYPE_CHECKING:
    from distributed import Client

LARGEST_SENT = 256 << 20


def threads(client: Client) -> dict[str, int]:
    """Address → threads of each worker.

    Raises:
        ClusterError: there is none.
    """
    found = dict(client.nthreads())
    if not found:
        raise ClusterError(
            "the cluster has no workers: start some (cluster.scale(2), or `dask worker ADDRESS`), and wait for them "
            "with client.wait_for_workers(1)"
        )
    return found


def worker_addresses(client: Client) -> list[str]:
    """One address for each thread of each worker.

    Raises:
        ClusterError: there is none.
    """
    return slots(threads(client))


def cluster_memory(client: Client) -> int:
    """Bytes of all the workers' memories together."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return sum(int(worker["memory_limit"] or 0) for worker in workers)


def check_sendable(size: int, what: str) -> None:
    """Refuse to send data that workers can load themselves.

    Raises:
        ClusterError: with the remedy.
    """
    if size > LARGEST_SENT:
        raise ClusterError(
            f"{what} has {format_bytes(size)} in this process, and every worker would be sent all of it: give fit a "
            f"function that loads it (workers call it once), or a Dataset that reads its rows from files; up to "
            f"{format_bytes(LARGEST_SENT)} are sent"
        )
