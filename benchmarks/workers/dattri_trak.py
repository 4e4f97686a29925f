"""dattri: TRAKAttributor with the margin and the correct-class probability of its examples, on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader

from benchmarks.inputs import Inputs
from benchmarks.protocol import Measurement, Options, run_method


def method(given: Inputs, options: Options, measurement: Measurement) -> Tensor:
    train, test = given.datasets()
    m, batch = options["m"], min(options["batch"], len(train))

    def log_probability(parameters: dict[str, Tensor], example: tuple[Tensor, Tensor]) -> Tensor:
        image, label = example
        return -F.cross_entropy(functional_call(given.model, parameters, image[None]), label[None])

    def margin(parameters: dict[str, Tensor], example: tuple[Tensor, Tensor]) -> Tensor:
        log_p = log_probability(parameters, example)
        return log_p - torch.log(1 - torch.exp(log_p))

    def probability(parameters: dict[str, Tensor], example: tuple[Tensor, Tensor]) -> Tensor:
        return torch.exp(log_probability(parameters, example))

    # dattri divides the gradients by √d and sums over the rows: the same λ in its units
    regularization = options["damping"] * len(train) / given.parameters
    with measurement.stage("fit"):
        task = AttributionTask(loss_func=margin, model=given.model, checkpoints=given.model.state_dict())
        attributor = TRAKAttributor(
            task=task,
            correct_probability_func=probability,
            projector_kwargs={"proj_dim": m, "device": "cpu"},
            regularization=regularization,
        )
        attributor.cache(DataLoader(train, batch_size=batch, shuffle=False))
    with measurement.stage("score"), torch.no_grad():
        values = attributor.attribute(DataLoader(test, batch_size=batch, shuffle=False)).T
    return values


if __name__ == "__main__":
    run_method(method)
