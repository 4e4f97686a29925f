"""How the influence on one test example is spread over the training examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from refluence.report.formatting import percent

CONCENTRATED = 0.5
DIFFUSE = 0.2
CURVE_POINTS = 48


@dataclass(frozen=True)
class Concentration:
    """The share of the total |influence| that the strongest examples hold.

    `share` is that of the `k` strongest, `half` how few examples hold half of the total, and `curve` the points
    (share of the examples, share of the total), strongest first.
    """

    n: int
    k: int
    share: float
    half: int
    curve: tuple[tuple[float, float], ...]

    @property
    def word(self) -> str:
        """The share in one word."""
        if self.half == 0:
            return "None"
        if self.share >= CONCENTRATED:
            return "Concentrated"
        return "Diffuse" if self.share < DIFFUSE else "Mixed"

    @property
    def reading(self) -> str:
        """The share in a sentence."""
        if self.half == 0:
            return "No training example has any influence here."
        strongest = "The strongest example holds" if self.k == 1 else f"The {self.k:,} strongest examples hold"
        half = f"half of it lies in {self.half:,} of {self.n:,}."
        return f"{strongest} {percent(self.share)} of the total influence; {half}"

    def path(self, width: float = 100, height: float = 40) -> str:
        """The curve as an SVG path in a box of this size, the origin at the lower left."""
        return "M" + "L".join(f"{width * x:.1f} {height * (1 - y):.1f}" for x, y in self.curve)


def concentration(scores: ArrayLike, k: int) -> Concentration:
    """The concentration of one row of scores; scores that are not finite count as zero."""
    strength = np.sort(np.abs(np.nan_to_num(np.asarray(scores, dtype=np.float64), posinf=0, neginf=0)))[::-1]
    n, total = strength.size, float(strength.sum())
    k = min(k, n)
    if total == 0:
        return Concentration(n, k, 0.0, 0, ((0.0, 0.0), (1.0, 1.0)))
    cumulative = np.cumsum(strength) / total
    half = int(np.searchsorted(cumulative, 0.5 - 1e-12)) + 1
    # dense where the curve bends, at the strongest examples
    ranks = np.unique(np.round(n * np.linspace(0, 1, CURVE_POINTS) ** 2).astype(int))
    heights = np.concatenate([[0.0], cumulative])[ranks]
    curve = tuple((float(rank / n), float(y)) for rank, y in zip(ranks, heights, strict=True))
    return Concentration(n, k, float(cumulative[k - 1]), half, curve)
