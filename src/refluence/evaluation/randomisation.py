"""Do the scores depend on what the model learnt? They should not be those of an untrained model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import torch
from torch import nn

from refluence.batches import Data
from refluence.evaluation.bootstrap import RESAMPLES, mean_estimate
from refluence.evaluation.correlation import spearman_columns
from refluence.evaluation.estimate import Estimate
from refluence.influence import Influence
from refluence.progress import track
from refluence.scores import Scores
from refluence.training import stream
from refluence.training.fresh import fresh_model


def randomisation(
    influence: Influence,
    train: Data,
    test: Data,
    *,
    scores: Scores | None = None,
    models: int = 1,
    build: Callable[[], nn.Module] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> Estimate:
    """Mean over tests of the Spearman correlation, over train examples, with scores of a re-initialised model.

    Near 0 where the scores come from what was learnt; near 1 where they come from inputs and architecture alone.

    Source: Adebayo et al. 2018, the model randomisation test; Hanawa et al. 2021 for attributions to training data.

    Args:
        influence: a fitted `Influence`; the other models are fitted with its settings.
        train, test: the data.
        scores: those of `influence` on `test`, where they exist already.
        models: untrained models to compare with.
        build: makes an untrained model; None: a copy whose modules draw their parameters anew.
        resamples, confidence: of the bootstrap over tests.
        seed: of the initialisations and the bootstrap.
        progress: whether a bar is shown.

    Returns:
        The estimate; `details` has one row a model and test: model, test, correlation.

    Raises:
        TaskError: a module that cannot be drawn anew, without `build`.
    """
    own = scores if scores is not None else influence.score(test)
    once = torch.ones(own.shape[1], 1, dtype=torch.float64)
    found, frames = [], []
    for i in track(range(models), "re-initialised models", enabled=progress):
        others = _untrained(influence, build, stream(seed, f"re-initialised model {i}")).fit(
            train, weights=_weights(influence)
        )
        other = others.score(test)
        correlations = spearman_columns(own.values.double().T, other.values.double().T, once)[0]
        found.append(correlations)
        frames.append(pd.DataFrame({"model": i, "test": own.test_ids, "correlation": correlations.numpy()}))
    values = torch.stack(found).mean(dim=0)
    result = mean_estimate("randomisation", values, resamples=resamples, confidence=confidence, seed=seed)
    return Estimate(
        result.name, result.value, result.low, result.high, confidence, pd.concat(frames, ignore_index=True)
    )


def _untrained(influence: Influence, build: Callable[[], nn.Module] | None, seed: int) -> Influence:
    settings = influence.settings
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build() if build is not None else fresh_model(settings.task.model)
    return Influence(
        replace(settings.task, model=model),
        curvature=settings.curvature,
        solver=settings.solver,
        damping=influence._damping_choice,
        blocks={block: list(names) for block, names in settings.groups.items()},
        device=settings.device,
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        progress=settings.progress,
        seed=settings.seed,
        execution=settings.execution.below(f"untrained-{seed}"),
        samples=settings.samples,
    )


def _weights(influence: Influence) -> torch.Tensor | None:
    return influence._fitted().curvature.weights
