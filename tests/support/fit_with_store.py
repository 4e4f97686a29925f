"""A process that fits with a store and saves its scores: STORE OUT SECONDS, those that a forward pass takes longer."""

import sys
from pathlib import Path

import torch

from support.stored import Counting, K, N, data, fitted

if __name__ == "__main__":
    torch.set_num_threads(1)
    store, out, seconds = sys.argv[1:]
    print("ready", flush=True)
    sys.stdin.readline()
    influence = fitted(data(N), Path(store), model=Counting(float(seconds)))
    torch.save(influence.score(data(K, seed=2)).values, out)
