"""The Dask client of an `rf.Execution`."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import weakref
from typing import TYPE_CHECKING, Any

from refluence.errors import ClusterError, PlanError

if TYPE_CHECKING:
    from distributed import Client

LOCAL = "local"
SECONDS_TO_CONNECT = 20

_open: dict[str, Client] = {}
_used: weakref.WeakSet[Client] = weakref.WeakSet()


def connected(cluster: Any) -> Client | None:
    """The client itself, that of an address, or of one worker for each core of this machine for "local".

    Raises:
        PlanError: something else, or the packages of the extra `distributed` are missing.
        ClusterError: nothing answers at the address.
    """
    if cluster is None:
        return None
    check_installed()
    from distributed import Client

    client = _of_address(cluster) if isinstance(cluster, str) else cluster
    if not isinstance(client, Client):
        raise PlanError(
            f'cluster must be a dask.distributed Client, the address of a scheduler or "{LOCAL}", not {cluster!r}'
        )
    if not _used:
        # Only now, so that it is called before Dask closes its clusters.
        atexit.register(_close)
    _used.add(client)
    return client


def check_installed() -> None:
    """Raise a PlanError where the packages of the extra `distributed` are missing."""
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise PlanError("a cluster needs Dask: pip install 'refluence[distributed]'") from error


def _close() -> None:
    """Close clients before their clusters, which else warn that they lose what is still held for them."""
    # That a worker takes its time to end is no news at the end of the program.
    logging.getLogger("distributed.nanny").setLevel(logging.ERROR)
    for client in list(_used):
        with contextlib.suppress(Exception):
            client.close()


def _of_address(address: str) -> Client:
    client = _open.get(address)
    if client is None or client.status != "running":
        _open[address] = client = _local() if address == LOCAL else _at(address)
    return client


def _local() -> Client:
    from distributed import Client, LocalCluster

    cluster = LocalCluster(
        n_workers=os.cpu_count() or 1,
        threads_per_worker=1,
        dashboard_address="127.0.0.1:0",
        # The errors of tasks come back as results, and need not be printed by every worker too.
        silence_logs=logging.CRITICAL,
    )
    return Client(cluster)


def _at(address: str) -> Client:
    from distributed import Client

    try:
        return Client(address, timeout=SECONDS_TO_CONNECT)
    except (OSError, ValueError) as error:
        reason = str(error).strip() or type(error).__name__
        raise ClusterError(
            f"no Dask scheduler answers at {address!r} ({reason}): start one (`dask scheduler`), and give the address "
            'that it prints, such as "tcp://host:8786"'
        ) from error
