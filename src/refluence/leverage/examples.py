"""Passes over a feature matrix: weighted, centred, without columns that carry nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.errors import DataError
from refluence.leverage.columns import ColumnCensus
from refluence.leverage.matrix import FeatureMatrix
from refluence.progress import track


@dataclass(eq=False)
class Examples:
    """The rows √w_i (x_i − x̄), x̄ = Σ w x / Σ w; without centring √w_i x_i.

    The first pass is over `reduced` stretches, which have the Gram matrix of all rows though x̄ is not yet known; it
    finds x̄ and the columns to keep, and `rows` is then as often as wanted.

    Args:
        matrix: X.
        centred: whether x̄ is taken away.
        weights: w ≥ 0 of each example; None: all 1.
        progress: whether long passes show a bar.
    """

    matrix: FeatureMatrix
    centred: bool = False
    weights: Float64[Tensor, " n"] | None = None
    progress: bool = True
    mean: Float64[Tensor, " d"] | None = field(default=None, init=False)
    _columns: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    _checked: bool = field(default=False, init=False)

    @property
    def n(self) -> int:
        """Rows."""
        return self.matrix.n

    @property
    def d(self) -> int:
        """Columns as given, kept or not."""
        return self.matrix.d

    @property
    def total_weight(self) -> float:
        """Σ w."""
        return float(self.n) if self.weights is None else float(self.weights.sum())

    def reduced(self, description: str) -> Iterator[Float64[Tensor, "c d"]]:
        """The first pass: stretches whose rows, all together, have the Gram matrix of the weighted centred rows.

        Each is centred by its own mean, and one more row √(W_a W_b/(W_a+W_b)) (x̄_b − x̄_a) joins it to the rows before
        (Chan, Golub & LeVeque, Algorithms for computing the sample variance, 1983): nothing cancels.
        """
        census = ColumnCensus(self.centred)
        weight, mean = 0.0, torch.zeros(self.d, dtype=torch.float64, device=self.matrix.device)
        for start, chunk in self._pass(description):
            census.see(chunk)
            w = self._weights(start, chunk)
            if not self.centred:
                yield chunk if w is None else chunk * w.sqrt()[:, None]
                continue
            own = float(chunk.shape[0]) if w is None else float(w.sum())
            if own == 0:
                continue
            here = chunk.mean(dim=0) if w is None else w @ chunk / own
            rows = chunk - here
            if w is not None:
                rows *= w.sqrt()[:, None]
            apart = here - mean
            joint = (weight * own / (weight + own)) ** 0.5
            mean = mean + apart * (own / (weight + own))
            weight += own
            yield torch.cat([rows, joint * apart[None]]) if joint else rows
        self.mean = mean if self.centred else None
        self._columns = census.kept()

    @property
    def columns(self) -> tuple[Tensor, Tensor]:
        """(columns that are kept, factor of each), once the first pass is done."""
        assert self._columns is not None, "the first pass is not done"
        return self._columns

    def rows(self, description: str) -> Iterator[tuple[int, Float64[Tensor, "c d"]]]:
        """(first row, rows with all columns), after the first pass; what multiplies the kept ones alone is embedded."""
        for start, chunk in self._pass(description):
            rows = chunk if self.mean is None else chunk - self.mean
            w = self._weights(start, chunk)
            yield start, rows if w is None else rows * w.sqrt()[:, None]

    def embed(self, B: Float64[Tensor, "k s"]) -> Float64[Tensor, "d s"]:
        """What multiplies rows with all columns as B does those with the kept ones."""
        kept, factors = self.columns
        wide = torch.zeros(self.d, B.shape[1], dtype=B.dtype, device=B.device)
        wide[kept] = B * factors[:, None]
        return wide

    def restrict(self, B: Float64[Tensor, "d s"]) -> Float64[Tensor, "k s"]:
        """The transpose of `embed`."""
        kept, factors = self.columns
        return B[kept] * factors[:, None]

    def keep_all_columns(self) -> None:
        """Do without a first pass: all columns, and the mean by a pass of its own where it is needed."""
        device = self.matrix.device
        self._columns = (torch.arange(self.d, device=device), torch.ones(self.d, dtype=torch.float64, device=device))
        if self.centred:
            total = torch.zeros(self.d, dtype=torch.float64, device=device)
            for start, chunk in self._pass("mean"):
                w = self._weights(start, chunk)
                total += chunk.sum(dim=0) if w is None else w @ chunk
            self.mean = total / self.total_weight

    def intercept(self) -> Float64[Tensor, " n"]:
        """w_i/Σw: the leverage that the column of ones adds to that of the centred rows."""
        if self.weights is None:
            return torch.full((self.n,), 1.0 / self.n, dtype=torch.float64, device=self.matrix.device)
        return self.weights / self.total_weight

    def _weights(self, start: int, chunk: Tensor) -> Tensor | None:
        return None if self.weights is None else self.weights[start : start + chunk.shape[0]]

    def _pass(self, description: str) -> Iterator[tuple[int, Tensor]]:
        total = -(-self.n // self.matrix.stretch)
        yield from track(self.matrix.chunks(check=not self._checked), description, total, self.progress)
        self._checked = True


def checked_weights(weights: Sequence[float] | Tensor | None, matrix: FeatureMatrix) -> Float64[Tensor, " n"] | None:
    """w as a float64 vector.

    Raises:
        DataError: of another length, negative, not finite, or all zero.
    """
    if weights is None:
        return None
    found = torch.as_tensor(weights, dtype=torch.float64, device=matrix.device).detach()
    if found.shape != (matrix.n,):
        raise DataError(
            f"weights must be one number for each of the {matrix.n:,} rows of {matrix.name}, not of shape "
            f"{tuple(found.shape)}"
        )
    wrong = (~torch.isfinite(found) | (found < 0)).nonzero()
    if wrong.numel():
        row = int(wrong[0])
        raise DataError(f"weights must be finite and ≥ 0; that of row {row} is {float(found[row])}")
    if not bool(found.any()):
        raise DataError("all weights are 0: give at least one row a positive weight")
    return found
