"""kronfluence: EK-FAC factors and pairwise scores, whole data sets as batches as in its examples of this size."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn

from benchmarks.inputs import Inputs
from benchmarks.protocol import Measurement, Options, run_method


class Classification(Task):
    """Summed cross-entropy, with sampled labels for the true Fisher, as in kronfluence's own examples."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        images, labels = batch
        logits = model(images)
        if sample:
            with torch.no_grad():
                labels = torch.multinomial(logits.softmax(dim=-1), num_samples=1).flatten()
        return F.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels, reduction="sum")


def method(given: Inputs, options: Options, measurement: Measurement) -> Tensor:
    train, test = given.datasets()
    torch.manual_seed(0)
    batch = min(options["batch"], len(train))
    with tempfile.TemporaryDirectory() as folder:
        with measurement.stage("fit"):
            task = Classification()
            model = prepare_model(given.model, task)
            analyzer = Analyzer("bench", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
            analyzer.fit_all_factors(
                "ekfac", train, per_device_batch_size=batch, factor_args=FactorArguments(strategy="ekfac")
            )
        with measurement.stage("score"):
            analyzer.compute_pairwise_scores(
                "scores",
                "ekfac",
                query_dataset=test,
                train_dataset=train,
                per_device_query_batch_size=len(test),
                per_device_train_batch_size=batch,
                score_args=ScoreArguments(damping_factor=options["damping"]),
            )
            values = analyzer.load_pairwise_scores("scores")["all_modules"]
    return values


if __name__ == "__main__":
    run_method(method)
