"""What softmax before cross-entropy, and rows in the order of leverage, do to training on MNIST's highest leverages.

`python -m benchmarks.leverage_softmax`

The convolutional network of the leverage study, from the study's starts, by Adam on the train rows of highest raw
leverage: shuffled every epoch or always in the order of leverage, with cross-entropy of the logits or of their softmax.
The rows by unpivoted QR in float32 are beside those by the right leverage. Prints the mean test accuracy over seeds in
%, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import time
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

import refluence as rf
from refluence.evaluation.rankings import ordering
from refluence.progress import track
from refluence.studies.leverage_basis import DEFAULTS
from refluence.studies.leverage_basis.artefact import unpivoted_leverage
from refluence.studies.leverage_basis.images import Images, load_images
from refluence.studies.leverage_basis.networks import BATCH, LEARNING_RATE, LONGEST, accuracy, untrained

STUDY = DEFAULTS["mnist"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000)
    parser.add_argument("--epochs", type=int, default=LONGEST)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    begin = time.process_time()
    images = load_images(STUDY)
    pixels = images.pixels[: images.n_train]
    scores = {"right": rf.leverage_scores(pixels, progress=False).values, "unpivoted QR": unpivoted_leverage(pixels)}
    highest = {name: ordering(values)[: arguments.rows] for name, values in scores.items()}
    common = int(torch.isin(*highest.values()).sum())
    print(f"{arguments.rows} rows, {common} of them by both leverages; {arguments.epochs} epochs")
    print("| leverage | order | loss | test accuracy, % | lowest to highest |\n| --- | --- | --- | --- | --- |")
    for (name, rows), shuffled, softmax in product(highest.items(), (True, False), (False, True)):
        seeds = track(range(1, arguments.seeds + 1), "training")
        found = [100 * test_accuracy(images, rows, seed, arguments.epochs, shuffled, softmax) for seed in seeds]
        order = "shuffled" if shuffled else "of leverage"
        loss = "softmax, cross-entropy" if softmax else "cross-entropy"
        mean = sum(found) / len(found)
        print(f"| {name} | {order} | {loss} | {mean:.1f} | {min(found):.1f} to {max(found):.1f} |", flush=True)
    print(f"{time.process_time() - begin:.0f} CPU seconds")


def test_accuracy(images: Images, rows: Tensor, seed: int, epochs: int, shuffled: bool, softmax: bool) -> float:
    """The share of test images that the trained network classifies rightly.

    A loop of its own, the same for all: `rf.training` shuffles always.
    """
    model = untrained(STUDY, images.side, seed)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    x, y = images.train
    for _ in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator)] if shuffled else rows
        for batch in order.split(BATCH):
            output = model(x[batch])
            loss = F.cross_entropy(output.softmax(dim=1) if softmax else output, y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return accuracy(model.eval(), images.test)


if __name__ == "__main__":
    main()
