"""The errors that the library raises; each message names the thing at fault, its value, and the remedy."""

from __future__ import annotations

from typing import Any


class RefluenceError(ValueError):
    """Base of every error that the library raises about its input."""


class DataError(RefluenceError):
    """A data set or batch that cannot be attributed: shuffled, empty, changing, wrongly shaped."""


class TaskError(RefluenceError):
    """A task whose loss, measurement, forward or parameter choice does not fit its model or data."""


class BadExampleError(RefluenceError):
    """An example that cannot be read, on which the model or the loss raises, or whose loss or gradient is not finite.

    Attributes:
        row: its number, as the message gives it.
        reason: what is wrong with it, without its number.
    """

    def __init__(self, message: str, row: int, reason: str) -> None:
        super().__init__(message)
        self.row, self.reason = row, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.row, self.reason), self.__dict__


class NonFiniteError(BadExampleError):
    """NaN or Inf in a loss or gradient; names the row of the example and the parameter."""


class NonDeterministicError(RefluenceError):
    """The same input gave two different outputs in eval mode; names the module."""


class PlanError(RefluenceError):
    """A plan that does not fit the memory, or that asks a solver for what it cannot do."""


class SketchSizeError(RefluenceError):
    """A sketch with too few rows for the damping or the effective dimension that is wanted."""


class StoreError(RefluenceError):
    """A store of gradients that cannot be used: of another fingerprint, full, not to be written to, or no store."""


class NotFittedError(RefluenceError):
    """Something was asked of an `Influence` before `fit`."""


class SolverError(RefluenceError):
    """A solver that cannot give the inverse: negative curvature, divergence."""


class ClusterError(RefluenceError):
    """A cluster that cannot do the work: no workers, workers that die, data too large to send."""
