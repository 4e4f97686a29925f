"""dattri: LoGraAttributor, both factors of every linear layer projected to √m numbers each, on the CPU.

Its projection is compiled by torch at the first call; that is in the warm-up, whose batches have another size.
"""

from __future__ import annotations

import tempfile

import torch.nn.functional as F
from dattri.algorithm.logra import LoGraAttributor
from dattri.task import AttributionTask
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.inputs import Inputs
from benchmarks.protocol import Measurement, Options, run_method


def loss(model: nn.Module, batch: tuple[Tensor, Tensor], device: str) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def method(given: Inputs, options: Options, measurement: Measurement) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        return scores(given, options, measurement, folder)


def scores(given: Inputs, options: Options, measurement: Measurement, folder: str) -> Tensor:
    train, test = given.datasets()
    loaders = [DataLoader(rows, batch_size=min(options["batch"], len(rows)), shuffle=False) for rows in (train, test)]
    with measurement.stage("fit"):
        task = AttributionTask(loss_func=loss, model=given.model, checkpoints=given.model.state_dict())
        # It writes what it knows of the batches to a file, and reads that file again in the next run.
        attributor = LoGraAttributor(
            task, damping=options["relative"], proj_dim=options["size"], offload="none", cache_dir=folder
        )
        attributor.cache(loaders[0])
    with measurement.stage("score"):
        values = attributor.attribute(*loaders).T
    return values


if __name__ == "__main__":
    run_method(method)
