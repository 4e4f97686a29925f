"""A number with its interval."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd


@dataclass(frozen=True, eq=False)
class Estimate:
    """A quantity measured on data, with a confidence interval; `float(estimate)` is its value.

    Args:
        name: of the quantity, such as "lds".
        value: the estimate.
        low, high: the interval.
        confidence: of the interval, such as 0.95.
        details: what it was computed from, tidy, such as one row a test example.
    """

    name: str
    value: float
    low: float
    high: float
    confidence: float = 0.95
    details: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)

    def __float__(self) -> float:
        return float(self.value)

    def to_frame(self) -> pd.DataFrame:
        """One row: metric, value, low, high, confidence."""
        return pd.DataFrame(
            [
                {
                    "metric": self.name,
                    "value": self.value,
                    "low": self.low,
                    "high": self.high,
                    "confidence": self.confidence,
                }
            ]
        )
