"""A process that fits on a cluster with a store: ADDRESS|own STORE SECONDS, those that a forward pass takes longer.

"own" is a LocalCluster of its own, which is left to the end of the process to close.
"""

import sys

import torch
from distributed import Client, LocalCluster

from support.clustered import BATCH, TEST, Network, data, influence

if __name__ == "__main__":
    torch.set_num_threads(1)
    address, store, seconds = sys.argv[1:]
    own = LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") if address == "own" else None
    client = Client(address if own is None else own)
    fitted = influence(client, Network(seconds=float(seconds)), store=store, shard_rows=BATCH).fit(data())
    fitted.score(TEST)
