"""Errors of sketched scores over all pairs, by what they are measured against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from numpy.typing import NDArray
from torch import Tensor

from refluence.studies.projection.spectral import Spectral
from refluence.studies.projection.system import SketchedSystem

Numbers = NDArray[np.float64]
KINDS = ("plain", "corrected")
STATISTICS = ("mean", "max", "95", "99")
TINY = 1e-12
"""Relative size below which a normaliser counts as zero, and its pairs are left out."""


@dataclass(frozen=True, eq=False)
class Normalisers:
    """Error ÷ (left_i · right_j) for each name, and ÷ |exact| of a pair where `relative`.

    Args:
        spectral: the exact side.
        damping: λ.
        diagonal: pairs are (test j, train j) only, as for self-influence.
        relative: also the error relative to the exact score, of pairs above 1e-10 of the largest.
    """

    spectral: Spectral
    damping: float
    diagonal: bool = False
    relative: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Published is "eps", ÷ √τ_0√τ_0; "gap" is ÷ √(τ_0−τ_λ)√(τ_0−τ_λ); "relative" ÷ |exact|."""
        return ("eps", "gap", *(("relative",) if self.relative else ()))

    @cached_property
    def _sides(self) -> dict[str, tuple[Tensor, Tensor]]:
        squares = {"eps": self.spectral.tau_0(), "gap": self.spectral.gap(self.damping)}
        return {name: (train.sqrt(), tests.sqrt()) for name, (train, tests) in squares.items()}

    def errors(
        self, scores: Float64[Tensor, "rows k"], exact: Float64[Tensor, "rows k"]
    ) -> Iterator[tuple[str, Float64[Tensor, " pairs"]]]:
        """(name, errors of the pairs that have a normaliser)."""
        difference = (scores - exact).abs_()
        if self.diagonal:
            difference, exact = difference.diagonal(), exact.diagonal()
        for name, (train, tests) in self._sides.items():
            rows, columns = train > TINY * train.max(), tests > TINY * tests.max()
            if self.diagonal:
                some = rows[: len(tests)] & columns
                yield name, difference[some] / (train[: len(tests)] * tests)[some]
            else:
                scaled = difference / train[:, None] / tests
                whole = bool(rows.all()) and bool(columns.all())
                yield name, (scaled if whole else scaled[rows][:, columns]).flatten()
        if self.relative:
            some = exact.abs() > max(1e-10 * float(exact.abs().max()), TINY)
            yield "relative", difference[some] / exact[some].abs()


def statistics(errors: Float64[Tensor, " pairs"]) -> list[float]:
    """Mean, maximum, 95 % and 99 % quantiles."""
    if errors.numel() == 0:
        return [float("nan")] * len(STATISTICS)
    values = errors.cpu().numpy()
    quantiles = np.quantile(values, (0.95, 0.99), overwrite_input=True)
    return [float(errors.mean()), float(errors.max()), *map(float, quantiles)]


@dataclass(frozen=True, eq=False)
class ErrorMeter:
    """Statistics of the errors of a sketched system at every damping, plain and corrected.

    Corrected: at μ = λ(1 − d_λ/m) the scores estimate those at λ; where m ≤ d_λ no μ > 0 does, and all is NaN.

    Args:
        spectral: the exact side.
        dampings: λ.
        diagonal: self-influence of the tests, which are the first train gradients.
        corrected: whether the corrected scores are measured too.
    """

    spectral: Spectral
    dampings: tuple[float, ...]
    diagonal: bool = False
    corrected: bool = True

    @cached_property
    def _exact(self) -> list[Float64[Tensor, "rows k"]]:
        exact = [self.spectral.scores(damping) for damping in self.dampings]
        return [values[: len(self.spectral.tests)] for values in exact] if self.diagonal else exact

    @cached_property
    def _rules(self) -> list[Normalisers]:
        return [Normalisers(self.spectral, damping, self.diagonal, self.diagonal) for damping in self.dampings]

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of a measurement, such as eps_95."""
        return tuple(f"{name}_{statistic}" for name in self._rules[0].names for statistic in STATISTICS)

    def corrected_dampings(self, size: int) -> list[float]:
        """μ = λ(1 − d_λ/m) with the exact d_λ."""
        return [damping * (1 - self.spectral.dimension(damping) / size) for damping in self.dampings]

    def measure(self, system: SketchedSystem) -> dict[str, Tensor]:
        """Of "plain" and, where asked for, "corrected" scores: one row a damping, one column a name."""
        if self.diagonal:
            system = system.first_rows(len(self.spectral.tests))
        corrected = self.corrected_dampings(system.size) if self.corrected else []
        found = system.scores([*self.dampings, *(mu for mu in corrected if mu > 0)])
        measured = {"plain": [self.row(next(found), i) for i in range(len(self.dampings))]}
        if self.corrected:
            nothing = [float("nan")] * len(self.names)
            measured["corrected"] = [self.row(next(found), i) if mu > 0 else nothing for i, mu in enumerate(corrected)]
        return {kind: torch.tensor(rows, dtype=torch.float64) for kind, rows in measured.items()}

    def frame(self, measured: Mapping[str, Tensor]) -> pd.DataFrame:
        """A measurement as a table: damping, effective_dimension, corrected, and the names."""
        parts = []
        # in an order of our own: a file gives its tensors in any
        for kind in KINDS[: len(measured)]:
            rows = measured[kind]
            part = pd.DataFrame(rows.numpy(), columns=list(self.names))
            part.insert(0, "damping", self.dampings)
            part.insert(1, "effective_dimension", [self.spectral.dimension(damping) for damping in self.dampings])
            part.insert(2, "corrected", kind == "corrected")
            parts.append(part)
        return pd.concat(parts, ignore_index=True)

    def without_sketch(self) -> Float64[Tensor, "l names"]:
        """The plateau: the errors where nothing is left of the scores, as of a sketch of far fewer rows than d_λ."""
        zero = [self.row(torch.zeros_like(exact), i) for i, exact in enumerate(self._exact)]
        return torch.tensor(zero, dtype=torch.float64)

    def row(self, scores: Float64[Tensor, "rows k"], place: int) -> list[float]:
        """The statistics of one score matrix, at the damping of this place."""
        return [
            value for _, errors in self._rules[place].errors(scores, self._exact[place]) for value in statistics(errors)
        ]


def interpolated(x: Numbers, y: Numbers, at: float) -> float:
    """y at a place between the first and last x, linear in the logarithms; NaN outside."""
    known = np.isfinite(y) & (y > 0)
    if known.sum() < 2 or not x[known].min() <= at <= x[known].max():
        return float("nan")
    return float(np.exp(np.interp(np.log(at), np.log(x[known]), np.log(y[known]))))


def log_slope(x: Numbers, y: Numbers, least: float, points: int = 3) -> float:
    """The slope of log y on log x where x ≥ least, by least squares; NaN with fewer than `points` of them."""
    some = (x >= least) & np.isfinite(y) & (y > 0)
    return float(np.polyfit(np.log(x[some]), np.log(y[some]), 1)[0]) if some.sum() >= points else float("nan")
