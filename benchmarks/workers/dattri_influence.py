"""dattri: an influence attributor with all train rows as one batch, as in its MNIST scripts."""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorEKFAC
from dattri.task import AttributionTask
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.inputs import Inputs
from benchmarks.protocol import Measurement, Options, run_method
from benchmarks.residual import CHECKED, relative_residual


def method(given: Inputs, options: Options, measurement: Measurement) -> Tensor:
    train, _ = given.datasets()
    tests = tuple(rows[: options.get("tests")] for rows in given.test)
    whole = DataLoader(train, batch_size=len(train), shuffle=False)
    asked = DataLoader(TensorDataset(*tests), batch_size=len(tests[0]), shuffle=False)

    def loss(parameters: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(functional_call(given.model, parameters, (images,)), labels)

    task = AttributionTask(loss_func=loss, model=given.model, checkpoints=given.model.state_dict())
    if options["method"] == "cg":
        attributor = IFAttributorCG(task=task, max_iter=options["steps"], regularization=options["damping"])
    else:
        attributor = IFAttributorEKFAC(task=task, damping=options["damping"])
    solved: list[Tensor] = []
    transform = attributor.transform_test_rep

    seconds = [0.0]

    def kept(ckpt_idx: int, test_rep: Tensor) -> Tensor:
        begin = time.perf_counter()
        solved.append(transform(ckpt_idx, test_rep))
        seconds[0] += time.perf_counter() - begin
        return solved[-1]

    attributor.transform_test_rep = kept
    with torch.no_grad() if options["no_grad"] else nullcontext():
        with measurement.stage("fit"):
            attributor.cache(whole)
        with measurement.stage("score"):
            values = attributor.attribute(whole, asked).T
    if options.get("tests"):
        # Only the solves are extrapolated to all tests: the rest is mostly the gradients of the train side.
        measurement.stages["gradients"] = measurement.stages.pop("score") - seconds[0]
        measurement.stages["solve"] = seconds[0]
    if options["method"] == "cg":
        first, rows = solved[0].detach()[:CHECKED], tuple(part[:CHECKED] for part in tests)
        measurement.facts["residual"] = relative_residual(given, first, rows, options["curvature"], options["damping"])
    return values


if __name__ == "__main__":
    run_method(method)
