"""The probability that a score with an error bar is among the k largest."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor

NODES = 129
SHARP_PLACES = np.array([-4.0, -3.2, -2.6, -2.1, -1.7, -1.3, -1.0, -0.7, -0.45, -0.2])
SHARP_NODES = 512
CERTAIN = 8.0
"""Standard errors beyond which a score never is."""
TAIL = 1e-6
BISECTIONS = 40
TABLE_NUMBERS = 1 << 23


def probability_in_top(
    values: Float[Tensor, "k n"], errors: Float[Tensor, "k n"], count: int
) -> Float64[Tensor, "k n"]:
    """P(x_j is among the `count` largest of its row) for independent x_j ~ N(value_j, error_j²).

    With F_j the distribution function of the `count`-th largest of the others it is ∫ φ_j(x) F_j(x) dx, and F_j(x) the
    probability that fewer than `count` of them exceed x: a sum of unequal coin tosses, convolved one by one. F_j is
    taken as linear between points over the range of the threshold, 129 and more about scores with errors far below it,
    which makes the result good to some 10⁻³. Only scores whose side of the threshold is not certain take part.

    Args:
        values, errors: means and standard deviations, a row for each test.
        count: how many are the top; all probabilities are 1 where it is n or more.
    """
    means, deviations = (x.detach().double().cpu().numpy() for x in (values, errors))
    found = [_of_row(mean, deviation, count) for mean, deviation in zip(means, deviations, strict=True)]
    return torch.from_numpy(np.stack(found)) if found else torch.zeros(values.shape, dtype=torch.float64)


def _of_row(mean: NDArray[np.float64], deviation: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    if count >= mean.size:
        return np.ones(mean.size)
    scale = max(float(np.abs(mean).max()), float(deviation.max()), np.finfo(float).tiny)
    # Ties of scores without an error are broken at random.
    deviation = np.maximum(deviation, 1e-12 * scale)
    upper, lower = mean + CERTAIN * deviation, mean - CERTAIN * deviation
    floor = -np.partition(-lower, count)[count]
    ceiling = -np.partition(-upper, count - 1)[count - 1]
    out = np.where(lower >= ceiling, 1.0, 0.0)
    open_ = np.flatnonzero((lower < ceiling) & (upper > floor))
    if open_.size:
        out[open_] = _of_open(mean[open_], deviation[open_], count - int(out.sum()), floor, ceiling)
    return out


def _of_open(
    mean: NDArray[np.float64], deviation: NDArray[np.float64], count: int, floor: float, ceiling: float
) -> NDArray[np.float64]:
    """The same of the scores that are not certain; the threshold lies between `floor` and `ceiling`."""
    if 2 * count > mean.size:
        return 1.0 - _of_open(-mean, deviation, mean.size - count, -ceiling, -floor)
    if count == 0:
        return np.zeros(mean.size)

    def above(x: float) -> NDArray[np.float64]:
        return ndtr((mean - x) / deviation)

    low = _bisect(lambda x: _surely(above(x), count + 1), floor, ceiling)
    high = _bisect(lambda x: _surely(1.0 - above(x), mean.size - count + 1), ceiling, floor)
    kept = np.flatnonzero(above(low) >= TAIL / mean.size)
    nodes = _nodes(low, high, mean[kept], deviation[kept])
    out = np.zeros(mean.size)
    exceed = ndtr((mean[kept, None] - nodes) / deviation[kept, None])
    step = max(1, TABLE_NUMBERS // (kept.size * count))
    fewer = np.concatenate(
        [_fewer_of_others(exceed[:, first : first + step], count) for first in range(0, nodes.size, step)], axis=1
    )
    panels = exceed[:, :-1] - exceed[:, 1:]
    out[kept] = (panels * (fewer[:, :-1] + fewer[:, 1:])).sum(axis=1) / 2 + exceed[:, -1] * fewer[:, -1]
    return np.clip(out, 0.0, 1.0)


def _nodes(low: float, high: float, mean: NDArray[np.float64], deviation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points from `low` to `high`, with more about the scores that are sharp on their scale."""
    even = np.linspace(low, high, NODES)
    sharp = deviation < 3 * (high - low) / NODES
    places = np.concatenate([SHARP_PLACES, [0.0], -SHARP_PLACES])
    more = np.sort((mean[sharp, None] + deviation[sharp, None] * places).ravel())
    more = more[(more > low) & (more < high)]
    if more.size > SHARP_NODES:
        more = more[np.linspace(0, more.size - 1, SHARP_NODES).astype(int)]
    return np.union1d(even, more)


def _bisect(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """The place furthest from `inside`, where `holds` is true, at which it still is."""
    for _ in range(BISECTIONS):
        middle = (inside + outside) / 2
        if holds(middle):
            inside = middle
        else:
            outside = middle
    return inside


def _surely(chances: NDArray[np.float64], count: int) -> bool:
    """Whether fewer than `count` successes have a probability below TAIL, by Bernstein's or Chernoff's inequality."""
    mean, least = float(chances.sum()), count - 1
    if mean <= least:
        return False
    wanted, excess = -math.log(TAIL), mean - least
    spread = float((chances * (1.0 - chances)).sum())
    return (
        excess**2 / (2 * (spread + excess / 3)) >= wanted
        or mean - least - (least * math.log(mean / least) if least else 0.0) >= wanted
    )


def _fewer_of_others(chances: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """(j, x): the probability that fewer than `count` of all but j succeed, at every x.

    The distribution of those before j, convolved with the distribution function of those after.
    """
    size, width = chances.shape
    before = np.zeros((size, count, width))
    running = np.zeros((count, width))
    running[0] = 1.0
    for j in range(size):
        before[j] = running
        _toss(running, chances[j])
    after = np.ones((count, width))
    out = np.empty((size, width))
    for j in reversed(range(size)):
        np.einsum("cx,cx->x", before[j], after[::-1], out=out[j])
        _toss(after, chances[j])
    return out


def _toss(distribution: NDArray[np.float64], chance: NDArray[np.float64]) -> None:
    """One more coin, in place."""
    moved = distribution[:-1] * chance
    distribution *= 1.0 - chance
    distribution[1:] += moved
