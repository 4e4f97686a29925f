"""The Dask client of an `rf.Execution`."""

from __future__ import annotations

import atexit
import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from refluence.errors import ClusterError, PlanError

if TYPE_CHECKING:
    from distributed import Client

LOCAL = "local"
SECONDS_TO_CONNECT = 20


def connected(cluster: Any) -> Client | None:
    """The client itself, that of an address, or of one worker for each core of this machine for "local".

    Raises:
        PlanError: something else, or the packages of the extra `distributed` are missing.
        ClusterError: nothing answers at the address.
    """
    if cluster is None:
        return None
    try:
        from distributed import Client
    except ImportError as error:
        raise PlanError("a cluster needs Dask: pip install 'refluence[distributed]'") from error
    if isinstance(cluster, str):
        return _local() if cluster == LOCAL else _at(cluster)
    if not isinstance(cluster, Client):
        raise PlanError(
            f'cluster must be a dask.distributed Client, the address of a scheduler or "{LOCAL}", not {cluster!r}'
        )
    return cluster


@lru_cache
def _local() -> Client:
    from distributed import Client, LocalCluster

    cluster = LocalCluster(n_workers=os.cpu_count() or 1, threads_per_worker=1, dashboard_address=None)
    client = Client(cluster)
    atexit.register(lambda: (client.close(), cluster.close()))
    return client


@lru_cache
def _at(address: str) -> Client:
    from distributed import Client

    try:
        client = Client(address, timeout=SECONDS_TO_CONNECT)
    except (OSError, ValueError) as error:
        reason = str(error).strip() or type(error).__name__
        raise ClusterError(
            f"no Dask scheduler answers at {address!r} ({reason}): start one (`dask scheduler`), and give the address "
            'that it prints, such as "tcp://host:8786"'
        ) from error
    atexit.register(client.close)
    return client
