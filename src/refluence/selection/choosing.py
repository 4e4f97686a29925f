"""`rf.select`: one call for every way of choosing rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from numpy.typing import ArrayLike
from torch import Tensor

from refluence.damping import EffectiveDimension, RelativeDamping
from refluence.errors import DataError
from refluence.selection.balance import quotas
from refluence.selection.coverage import k_center
from refluence.selection.determinant import d_optimal, pivoted_qr
from refluence.selection.herding import herding
from refluence.selection.result import Selection, unweighted
from refluence.selection.sampling import distinct_sampling, sampling
from refluence.training.recipe import stream

BY_SCORE = ("top", "bottom", "sampling", "distinct_sampling")
BY_FEATURES = ("d_optimal", "pivoted_qr", "herding", "k_center")
METHODS = (*BY_SCORE, *BY_FEATURES, "random")

Ridge = float | RelativeDamping | EffectiveDimension
Chosen = tuple[Tensor, Tensor]
Choose = Callable[[Tensor, int, np.random.Generator], Chosen]


def select(
    data: Any,
    k: int,
    method: str = "top",
    *,
    labels: Tensor | ArrayLike | None = None,
    ridge: Ridge | None = None,
    bandwidth: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Selection:
    """Choose k of n rows.

    By a score of each row:

    - "top", "bottom": the k highest or lowest, the lowest row first on ties.
    - "sampling": k draws with replacement, p_i ∝ score; w_i = draws/(k p_i), a row drawn twice given once.
    - "distinct_sampling": k distinct rows with probabilities π_i = min(1, c·score); w_i = 1/π_i.

    By their features: "d_optimal", "pivoted_qr", "herding", "k_center" (`rf.selection`). "random": k distinct rows,
    each equally likely, w_i = n/k.

    Args:
        data: scores (n,) of any kind (`rf.LeverageScores`, `rf.selection.el2n`, `rf.selection.grand`), or features
            (n, d), whose leverage scores are then the scores.
        k: how many; of "sampling" the draws, of all others the rows.
        labels: the class of each row: k is then split evenly over the classes, as far as they have rows, and the method
            used within each (leverage scores are those among all rows). The order goes round the classes.
        ridge: of the leverage scores of features, 0 by default, and of "d_optimal", which needs one; a number in units
            of XᵀX/n, `rf.RelativeDamping` or `rf.EffectiveDimension`.
        bandwidth: of the Gaussian kernel of "herding"; None: the inner product.
        seed: of the random methods; the same gives the same rows.
        progress: show how far it is.

    Raises:
        DataError: an unknown method, or an argument that the method or the data has no use for; a k below 1 or above n;
            NaN; scores where the method needs features.
    """
    if method not in METHODS:
        raise DataError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    values = _values(data)
    n = len(values)
    _check_count(k, n, method)
    choose = _chooser(values, method, ridge, bandwidth, progress)
    if labels is None:
        indices, weights = choose(torch.arange(n), k, _generator(seed, method, 0))
    else:
        indices, weights = _balanced(choose, _codes(labels, n), k, seed, method)
    settings: dict[str, Any] = {"k": int(k), "seed": seed, "balanced": labels is not None}
    settings |= {} if ridge is None else {"ridge": ridge if isinstance(ridge, float | int) else repr(ridge)}
    settings |= {} if bandwidth is None else {"bandwidth": bandwidth}
    return Selection(indices, weights, n, method, settings)


def _balanced(choose: Choose, codes: Int64[Tensor, " n"], k: int, seed: int, method: str) -> Chosen:
    counts = quotas(torch.bincount(codes), k)
    parts = [
        (code, rows, *choose(rows, count, _generator(seed, method, code)))
        for code, count in enumerate(counts.tolist())
        if count and len(rows := (codes == code).nonzero()[:, 0])
    ]
    ranks = torch.cat([torch.arange(len(indices)) for _, _, indices, _ in parts])
    order = ranks.argsort(stable=True)
    return (
        torch.cat([indices for _, _, indices, _ in parts])[order],
        torch.cat([weights for *_, weights in parts])[order],
    )


def _chooser(values: Tensor, method: str, ridge: Ridge | None, bandwidth: float | None, progress: bool) -> Choose:
    """A function (rows to choose from, k, generator) → (rows, weights)."""
    features = values.ndim == 2
    if bandwidth is not None and method != "herding":
        raise DataError(f'a bandwidth is of "herding", not of {method!r}: leave it out')
    if ridge is not None and not (features and (method in BY_SCORE or method == "d_optimal")):
        what = f"method {method!r}" if features else "scores that are given"
        raise DataError(f"a ridge is of leverage scores of features and of d_optimal; {what} has none: leave it out")
    if method == "random":
        return partial(_random, len(values))
    if method in BY_SCORE:
        return partial(_by_score, _leverage(values, ridge) if features else values, method)
    if not features:
        raise DataError(f"method {method!r} needs features (n, d), not scores of shape {tuple(values.shape)}")
    if method == "d_optimal":
        if ridge is None:
            raise DataError(
                '"d_optimal" needs a ridge, such as rf.RelativeDamping(0.01); "pivoted_qr" is its limit at 0'
            )
        ridge = float(ridge) if isinstance(ridge, float | int) else _ridge_number(values, ridge)
        return _by_features(values, partial(d_optimal, ridge=ridge, progress=progress))
    if method == "pivoted_qr":
        return _by_features(values, pivoted_qr)
    if method == "herding":
        return _by_features(values, partial(herding, bandwidth=bandwidth, progress=progress))
    return _by_features(values, partial(k_center, progress=progress))


def _random(n: int, rows: Tensor, k: int, generator: np.random.Generator) -> Chosen:
    chosen = rows[torch.from_numpy(generator.permutation(len(rows))[:k])]
    return chosen, torch.full((k,), len(rows) / k, dtype=torch.float64)


def _by_score(
    scores: Float64[Tensor, " n"], method: str, rows: Tensor, k: int, generator: np.random.Generator
) -> Chosen:
    own = scores[rows]
    if method in ("sampling", "distinct_sampling"):
        draw = sampling if method == "sampling" else distinct_sampling
        chosen, weights = draw(own, k, generator)
        return rows[chosen], weights
    chosen = rows[own.argsort(descending=method == "top", stable=True)[:k]]
    return chosen, unweighted(chosen)


def _by_features(X: Float64[Tensor, "n d"], function: Callable[[Tensor, int], Tensor]) -> Choose:
    def choose(rows: Tensor, k: int, generator: np.random.Generator) -> Chosen:
        chosen = rows[function(X if len(rows) == len(X) else X[rows], k)]
        return chosen, unweighted(chosen)

    return choose


def _leverage(X: Float64[Tensor, "n d"], ridge: Ridge | None) -> Float64[Tensor, " n"]:
    from refluence.leverage import leverage_scores

    return leverage_scores(X, 0.0 if ridge is None else ridge).values


def _ridge_number(X: Float64[Tensor, "n d"], ridge: Ridge) -> float:
    from refluence.leverage import leverage_scores

    return float(leverage_scores(X, ridge).damping)


def _generator(seed: int, method: str, code: int) -> np.random.Generator:
    return np.random.default_rng(stream(seed, f"select {method} {code}"))


def _values(data: Any) -> Tensor:
    """Scores (n,) or features (n, d) in float64.

    Raises:
        DataError: another shape, no rows, or NaN and infinity.
    """
    given = data if isinstance(data, Tensor) else getattr(data, "values", data)
    values = torch.as_tensor(given).detach().cpu().double()
    if values.ndim not in (1, 2) or values.numel() == 0:
        raise DataError(f"give scores (n,) or features (n, d), not an array of shape {tuple(values.shape)}")
    wrong = ~torch.isfinite(values if values.ndim == 1 else values.sum(dim=1))
    if bool(wrong.any()):
        raise DataError(f"row {int(wrong.nonzero()[0])} holds NaN or infinity")
    return values


def _check_count(k: int, n: int, method: str) -> None:
    if not isinstance(k, Integral) or k < 1:
        raise DataError(f"k must be an integer of at least 1, not {k!r}")
    if k > n and method != "sampling":
        raise DataError(f"{k} of {n} rows cannot be chosen: ask for at most {n}")


def _codes(labels: Tensor | ArrayLike, n: int) -> Int64[Tensor, " n"]:
    given = np.asarray(labels)
    if given.shape != (n,):
        raise DataError(f"labels must be one for each of {n} rows, not of shape {given.shape}")
    return torch.from_numpy(np.unique(given, return_inverse=True)[1].astype(np.int64))
