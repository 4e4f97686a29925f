"""Every method on every test that the given data allow, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from numpy.typing import ArrayLike
from torch import Tensor

from refluence.batches import Data
from refluence.errors import DataError
from refluence.evaluation.agreement import loo_agreement
from refluence.evaluation.baselines import baseline_scores, random_scores
from refluence.evaluation.bootstrap import RESAMPLES
from refluence.evaluation.estimate import Estimate
from refluence.evaluation.ground_truth import GroundTruth
from refluence.evaluation.lds import lds
from refluence.evaluation.mislabel import mislabel
from refluence.evaluation.retrieval import class_retrieval, top_cardinality
from refluence.influence import Influence
from refluence.scores import Scores
from refluence.solvers import Identity
from refluence.task import Task

MOST_LEFT_OUT = 0.1
"""Share of the train examples up to which leaving them out counts as leave-one-out or leave-group-out."""

Method = Any
Metric = Callable[[Scores | Tensor], Estimate | pd.DataFrame]


def evaluate(
    methods: Mapping[str, Method],
    ground_truth: GroundTruth | None = None,
    *,
    test: Data | None = None,
    train: Data | None = None,
    task: Task | None = None,
    wrong: Tensor | ArrayLike | None = None,
    labels: tuple[Any, Any] | None = None,
    k: int = 10,
    measurement: str = "loss",
    baselines: bool = True,
    metrics: Mapping[str, Metric] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """One row for each method and metric, baselines included.

    - With a ground truth of subsets: the LDS. Where every subset leaves out at most a tenth of the examples and there
      are models trained on all: the metrics of `loo_agreement`, pooled, as "loo_pearson" and so on.
    - With `wrong`: "auroc", "average_precision" and "detection_area" of self-influence (of the loss and the gradient
      norm for the baselines) as a sign of a wrong label; for methods that can give it.
    - With `labels`: "class_retrieval" of the top 1. Always: "top_cardinality" of the top k.

    Args:
        methods: name → `rf.Scores`, (n_test, n_train), or something fitted with `score(test)`, such as `rf.Influence`.
        ground_truth: models retrained on parts of the data.
        test: the test rows, to score what is not scored, and for the baselines.
        train, task: for the baselines; without them only "random" is there. The task of the first `rf.Influence` is
            used where none is given.
        wrong: train rows with wrong labels, or (n,) booleans.
        labels: (train labels, test labels).
        k: of the cardinality.
        measurement: of the ground truth.
        baselines: whether to add `baseline_scores`.
        metrics: further ones: name → function of scores that gives an `Estimate` or a frame with the columns metric,
            value, low, high.
        resamples, confidence, seed: of the bootstrap, with the same resamples for every method.
        progress: whether the baselines show bars.

    Returns:
        Tidy rows: method, kind ("method" or "baseline"), metric, value, low, high, confidence.

    Raises:
        DataError: a method that needs `test` without it, or no method; and as the metrics.
    """
    scored, suspicion = _scored(methods, test, wrong is not None)
    kinds = dict.fromkeys(scored, "method")
    if baselines:
        found = task or next((m.task for m in methods.values() if isinstance(m, Influence)), None)
        k_tests, n = _shape(scored)
        if found is not None and train is not None and test is not None:
            others: Mapping[str, Scores | Tensor] = baseline_scores(found, train, test, seed=seed, progress=progress)
            if wrong is not None:
                own = _baseline_suspicion(others, found, train, progress)
                suspicion |= {name: each for name, each in own.items() if name not in scored}
        else:
            others = {"random": random_scores(k_tests, n, seed=seed)}
        others = {name: each for name, each in others.items() if name not in scored}
        scored = {**scored, **others}
        kinds |= dict.fromkeys(others, "baseline")
    settings: dict[str, Any] = {"resamples": resamples, "confidence": confidence, "seed": seed}
    frames = []
    for name, scores in scored.items():
        parts: list[Estimate | pd.DataFrame] = []
        if ground_truth is not None:
            parts.append(_against(scores, ground_truth, measurement, settings))
        if wrong is not None and name in suspicion:
            parts.append(mislabel(suspicion[name], wrong, **settings).to_frame())
        if labels is not None:
            parts.append(class_retrieval(scores, *labels, **settings))
        parts.append(top_cardinality(scores, min(k, _shape(scored)[1])))
        parts += [_named(metric(scores), key) for key, metric in (metrics or {}).items()]
        frames += [_tidy(part).assign(method=name, kind=kinds[name]) for part in parts]
    table = pd.concat(frames, ignore_index=True)
    return table[["method", "kind", "metric", "value", "low", "high", "confidence"]]


def _scored(
    methods: Mapping[str, Method], test: Data | None, suspect: bool
) -> tuple[dict[str, Scores | Tensor], dict[str, Tensor]]:
    if not methods:
        raise DataError("no method was given")
    scored: dict[str, Scores | Tensor] = {}
    suspicion: dict[str, Tensor] = {}
    for name, method in methods.items():
        if isinstance(method, (Scores, Tensor)):
            scored[name] = method
        elif hasattr(method, "score"):
            if test is None:
                raise DataError(f"method {name!r} must score the test rows: give test=")
            scored[name] = method.score(test)
            if suspect and hasattr(method, "self_influence"):
                suspicion[name] = method.self_influence()
        else:
            raise DataError(
                f"method {name!r} is a {type(method).__name__}: give rf.Scores, a tensor (n_test, n_train), or a "
                "fitted rf.Influence"
            )
    return scored, suspicion


def _shape(scored: Mapping[str, Scores | Tensor]) -> tuple[int, int]:
    k, n = next(iter(scored.values())).shape
    return k, n


def _against(
    scores: Scores | Tensor, ground_truth: GroundTruth, measurement: str, settings: Mapping[str, Any]
) -> Estimate | pd.DataFrame:
    left_out = (~ground_truth.masks).sum(dim=1)
    if ground_truth.baseline is None or int(left_out.max()) > max(1, MOST_LEFT_OUT * ground_truth.n_train):
        return lds(scores, ground_truth, measurement=measurement, **settings)
    frame = loo_agreement(scores, ground_truth, measurement=measurement, **settings)
    pooled = frame[frame["scope"] == "pooled"]
    return pooled.assign(metric="loo_" + pooled["metric"])


def _baseline_suspicion(
    others: Mapping[str, Scores | Tensor], task: Task, train: Data, progress: bool
) -> dict[str, Tensor]:
    loss = others["loss"]
    assert isinstance(loss, Scores)
    norms = Influence(task, solver=Identity(), progress=progress).fit(train).self_influence()
    random = others["random"]
    assert isinstance(random, Scores)
    return {"loss": loss.values[0], "gradient dot": norms, "random": random.values[0]}


def _named(part: Estimate | pd.DataFrame, name: str) -> Estimate | pd.DataFrame:
    if isinstance(part, Estimate):
        return part.to_frame().assign(metric=name)
    return part


def _tidy(part: Estimate | pd.DataFrame) -> pd.DataFrame:
    return part.to_frame() if isinstance(part, Estimate) else part.copy()
