"""What is known of the error of an influence's scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from refluence.certificates.deterministic import DeterministicBound
from refluence.certificates.sampled import SampledCheck
from refluence.scores import Scores

WHAT_IT_IS = (
    "It certifies how well the solver computed τ, not that removing an example does what τ predicts: for that, see "
    "rf.evaluation.verify."
)


@dataclass(frozen=True, eq=False)
class Certificate:
    """How far the scores of a solver are from the exact ones of the same curvature at the same damping.

    Attributes:
        scores: what is certified, with `scores.error` where the solver has a standard error.
        confidence: of all statements that are not certain.
        solver: which one it was.
        exact: whether the scores are exact up to rounding.
        frame: one row a test: test, standard_error (‖error_i‖/‖τ_i‖), checked, error (‖τ̃_i − τ_i‖/‖τ_i‖ where checked),
            bound (the certain one, ‖bound_i‖/‖τ̃_i‖), outside (‖r‖/‖v‖), leaked and leakage_deviation (relative to the
            root mean square score of the test). NaN where something is not known.
        sampled: the comparison with exact scores of sampled tests; None for an exact solver.
        bound: for certain, for every pair; None where it does not apply.
        residual: the largest relative residual ‖(C+μ)s − v‖/‖v‖ of an iterative solver, None for others.
        notes: what is not known, and why.
    """

    scores: Scores
    confidence: float
    solver: str
    exact: bool
    frame: pd.DataFrame
    sampled: SampledCheck | None = None
    bound: DeterministicBound | None = None
    residual: float | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def largest_error(self) -> float:
        """The largest measured ‖τ̃_i − τ_i‖/‖τ_i‖ of the checked tests; 0 for an exact solver."""
        return 0.0 if self.sampled is None else float(self.sampled.errors.max())

    def summary(self) -> str:
        """All this in sentences."""
        if self.exact:
            said = [f"{self.solver} gives the exact scores up to rounding."]
        else:
            said = [f"Scores by {self.solver} at damping {_numbers(self.scores.target_damping)}."]
        said += [text for text in (self._errors(), self._measured(), self._certain(), self._residual()) if text]
        return " ".join([*said, *self.notes, WHAT_IT_IS])

    def _errors(self) -> str:
        if self.scores.error is None:
            return ""
        return (
            f"Its own standard error is {_percent(self.frame['standard_error'].median())} of a test's scores in the "
            f"median (root of the sums of squares)."
        )

    def _measured(self) -> str:
        check = self.sampled
        if check is None:
            return ""
        count = len(check.rows)
        which = f"{count} random" if count < len(self.frame) else f"all {count}"
        text = (
            f"Against {check.reference} on {which} tests the error is "
            f"{_percent(float(check.errors.median()))} in the median and {_percent(self.largest_error)} at most"
        )
        if count < len(self.frame):
            text += (
                f"; with confidence {self.confidence:g}, at least {_percent(check.share)} of tests like these have no "
                "larger one"
            )
        if check.coverage is not None:
            text += (
                f". {_percent(check.coverage)} of the exact scores lie in their {_percent(check.confidence)} interval"
            )
        return text + "."

    def _certain(self) -> str:
        if self.bound is None:
            return ""
        factor, size = max(self.bound.factors.values()), float(self.frame["bound"].median())
        said = f"For certain, no score inside the span of the train gradients errs by more than {factor:.3g}·√gap·√gap"
        if size < 1:
            said += f", and no score of these tests by more than {_percent(size)} of its test's scores in the median"
        else:
            said += "; over these tests that bound is larger than the scores themselves, and of no use"
        outside = _percent(float(self.bound.outside.median()))
        return f"{said}. {outside} of a test gradient lies outside that span in the median."

    def _residual(self) -> str:
        return "" if self.residual is None else f"The largest relative residual is {self.residual:.1e}."

    def to_frame(self) -> pd.DataFrame:
        """`frame`."""
        return self.frame

    def manifest(self) -> dict[str, Any]:
        """The numbers for a record, JSON-able."""
        check, bound = self.sampled, self.bound
        return {
            "solver": self.solver,
            "exact": self.exact,
            "confidence": self.confidence,
            "target_damping": self.scores.target_damping,
            "median_standard_error": _number(self.frame["standard_error"].median()),
            "checked": 0 if check is None else len(check.rows),
            "reference": None if check is None else check.reference,
            "largest_error": self.largest_error,
            "median_error": None if check is None else float(check.errors.median()),
            "share_bounded": None if check is None else check.share,
            "coverage": None if check is None else check.coverage,
            "bound_factors": None if bound is None else dict(bound.factors),
            "median_bound": _number(self.frame["bound"].median()),
            "median_outside": None if bound is None else float(bound.outside.median()),
            "residual": self.residual,
            "notes": list(self.notes),
            "sentence": self.summary(),
        }

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"Certificate({self.solver}, {len(self.frame)} tests, largest measured error {self.largest_error:.3g})"


def relative_norms(values: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """‖values_i‖/‖scores_i‖ by rows."""
    tiny = torch.finfo(torch.float64).tiny
    return values.double().norm(dim=1) / scores.double().norm(dim=1).clamp(min=tiny)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _numbers(damping: float | Mapping[str, float] | None) -> str:
    if isinstance(damping, Mapping):
        return ", ".join(f"{value:.3g} ({block})" for block, value in damping.items())
    return "0" if damping is None else f"{damping:.3g}"


def _number(value: Any) -> float | None:
    return None if value is None or value != value else float(value)
