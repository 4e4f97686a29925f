"""Whether the most helpful training examples are of the test example's own class, and how much they repeat."""

from __future__ import annotations

import math

import pandas as pd
import torch
from jaxtyping import Float64
from numpy.typing import ArrayLike
from torch import Tensor

from refluence.errors import DataError
from refluence.evaluation.bootstrap import RESAMPLES, mean_estimate
from refluence.evaluation.estimate import Estimate
from refluence.evaluation.lds import row_ids
from refluence.scores import Scores


def class_retrieval(
    scores: Scores | Tensor,
    train_labels: Tensor | ArrayLike,
    test_labels: Tensor | ArrayLike,
    k: int = 1,
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
    name: str = "class_retrieval",
) -> Estimate:
    """The share of the k most helpful training examples that have the test example's label, mean over tests.

    Examples tied at the k-th place share it. Chance is the label's share of the training set.

    Args:
        scores: `rf.Scores` or (n_test, n_train).
        train_labels, test_labels: one integer an example: the class, or what else should agree.
        k: how many of the most helpful ones.
        resamples, confidence, seed: of the bootstrap over tests.
        name: of the estimate.

    Returns:
        The estimate; `details` has one row a test: test, share, chance.

    Raises:
        DataError: labels of another count, or k outside 1…n_train.
    """
    values = (scores.values if isinstance(scores, Scores) else scores).detach().cpu().double()
    train, test = _labels(train_labels, values.shape[1], "train"), _labels(test_labels, values.shape[0], "test")
    same = test[:, None] == train[None, :]
    share = (top_shares(values, k) * same).sum(dim=1) / k
    result = mean_estimate(name, share, resamples=resamples, confidence=confidence, seed=seed)
    details = pd.DataFrame(
        {
            "test": row_ids(scores, len(values)),
            "share": share.numpy(),
            "chance": same.double().mean(dim=1).numpy(),
        }
    )
    return Estimate(result.name, result.value, result.low, result.high, confidence, details)


def subclass_retrieval(
    scores: Scores | Tensor,
    train_subclasses: Tensor | ArrayLike,
    test_subclasses: Tensor | ArrayLike,
    k: int = 1,
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """`class_retrieval` of subclasses that the model was not trained to tell apart.

    Train the model on coarse labels (say, even and odd) and give the fine ones (the digits) here: same-class examples
    cannot win by the label alone (Hanawa et al. 2021).

    Raises:
        DataError: as `class_retrieval`.
    """
    return class_retrieval(
        scores,
        train_subclasses,
        test_subclasses,
        k,
        resamples=resamples,
        confidence=confidence,
        seed=seed,
        name="subclass_retrieval",
    )


def top_cardinality(scores: Scores | Tensor, k: int = 10) -> Estimate:
    """|∪_i top_k(i)| / (k · n_test): 1 where every test has explanations of its own, 1/n_test where all have the same.

    It has no interval, because resampled tests repeat their explanations: low and high are NaN.

    Raises:
        DataError: k outside 1…n_train.
    """
    values = (scores.values if isinstance(scores, Scores) else scores).detach().cpu()
    _check_k(k, values.shape[1])
    distinct = len(values.topk(k, dim=1).indices.unique())
    return Estimate("top_cardinality", distinct / (k * values.shape[0]), math.nan, math.nan)


def top_shares(values: Float64[Tensor, "k n"], k: int) -> Float64[Tensor, "k n"]:
    """How much of each example is among the k highest of its row, where those tied at the k-th place share it."""
    _check_k(k, values.shape[1])
    last = values.topk(k, dim=1).values[:, -1:]
    above, tied = values > last, values == last
    room = k - above.sum(dim=1, keepdim=True)
    return above.double() + tied * (room / tied.sum(dim=1, keepdim=True))


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise DataError(f"k must be from 1 to the {n} train examples, not {k}")


def _labels(labels: Tensor | ArrayLike, n: int, which: str) -> Tensor:
    given = torch.as_tensor(labels).cpu()
    if given.shape != (n,):
        raise DataError(
            f"the {which} labels have shape {tuple(given.shape)}: give one for each of {n} {which} examples"
        )
    return given
