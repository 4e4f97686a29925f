"""What is done to the columns of scores, one for each train example: weights, norms, groups."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from refluence.batches import Batches
from refluence.errors import DataError
from refluence.task import batch_targets

NORMALISATIONS = ("theta-relatif", "l-relatif")


def checked_weights(weights: Sequence[float] | Tensor, n: int, negative: bool = False) -> Float[Tensor, " n"]:
    """One finite number for each train example, ≥ 0 unless `negative`.

    Raises:
        DataError: another count, or such a number, with its index.
    """
    values = torch.as_tensor(weights, dtype=torch.float64).detach()
    if values.shape != (n,):
        raise DataError(f"weights must be one number for each of {n} train examples, not shape {tuple(values.shape)}")
    wrong = ~torch.isfinite(values) if negative else ~torch.isfinite(values) | (values < 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise DataError(
            f"weights must be finite{'' if negative else ' and ≥ 0'}; weights[{row}] is {values[row].item()}"
        )
    return values


def check_normalisation(normalize: str | None) -> None:
    """Refuse an unknown normalisation.

    Raises:
        DataError: with the known ones.
    """
    if normalize is not None and normalize not in NORMALISATIONS:
        raise DataError(f"normalize must be one of {NORMALISATIONS} or None, not {normalize!r}")


def group_codes(groups: str | Iterable[Any], train: Batches) -> tuple[Tensor, Any]:
    """(number of the group of each train example, the groups' labels in order).

    Raises:
        DataError: another word than "class", another count of labels, or missing ones.
    """
    if isinstance(groups, str) and groups != "class":
        raise DataError(f'groups must be one label for each train example, or "class", not {groups!r}')
    labels = _classes(train) if isinstance(groups, str) else groups
    if isinstance(labels, Tensor):
        labels = labels.cpu().numpy()
    codes, names = pd.factorize(pd.Series(list(labels)), sort=True)
    if len(codes) != train.n:
        raise DataError(f"groups has {len(codes)} labels for {train.n} train examples")
    if (codes < 0).any():
        raise DataError("groups has missing labels: give every train example one")
    return torch.as_tensor(codes), np.asarray(names)


@dataclass(frozen=True)
class ColumnSums:
    """Σ_{j in group} f_j · column j.

    Args:
        factors: f_j.
        codes: the number of the group of each column.
        count: how many groups.
    """

    factors: Float[Tensor, " n"]
    codes: Int64[Tensor, " n"]
    count: int

    @property
    def matrix(self) -> Float64[Tensor, "n g"]:
        """A with `columns(values)` = values @ A."""
        out = torch.zeros(len(self.codes), self.count, dtype=torch.float64)
        out[torch.arange(len(self.codes)), self.codes.cpu()] = self.factors.double().cpu()
        return out

    def stretch(self, first: int, count: int) -> ColumnSums:
        """The same of `count` columns from the first on, alone."""
        here = slice(first, first + count)
        return ColumnSums(self.factors[here], self.codes[here], self.count)

    def columns(self, values: Float[Tensor, "k n"]) -> Float[Tensor, "k g"]:
        """The columns of each group, times their factors, added."""
        summed = torch.zeros(values.shape[0], self.count, dtype=values.dtype, device=values.device)
        return summed.index_add_(1, self.codes.to(values.device), values * self.factors.to(values))

    def rows(self, values: Float[Tensor, "n m"]) -> Float[Tensor, "g m"]:
        """The same of rows."""
        return self.columns(values.T).T


@dataclass(frozen=True)
class Columns:
    """What is done to the columns of scores: column j times f_j, then the columns of a group added.

    Args:
        ids: of the columns that are left.
        factors: f_j; None: all 1.
        sums: of the groups, with the factors in them; None: no groups.
    """

    ids: np.ndarray
    factors: Float[Tensor, " n"] | None = None
    sums: ColumnSums | None = None

    def values(self, values: Float[Tensor, "k n"]) -> Float[Tensor, "k g"]:
        """The columns of scores."""
        if self.sums is not None:
            return self.sums.columns(values)
        return values if self.factors is None else values * self.factors

    def errors(self, errors: Float[Tensor, "k g"]) -> Float[Tensor, "k g"]:
        """The columns of standard errors, which a state gives for sums where there are some."""
        return errors if self.factors is None or self.sums is not None else errors * self.factors.abs()


def _classes(train: Batches) -> Tensor:
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed from the user's random state
        targets = [batch_targets(batch) for _, batch in train]
    labels = torch.cat([torch.as_tensor(part) for part in targets])
    if labels.ndim != 1:
        raise DataError(f'groups="class" needs one target for each example; the targets have shape {labels.shape}')
    return labels


def hash_numbers(values: Sequence[float] | Tensor) -> str:
    """A hash of a vector of numbers, for manifests."""
    return hashlib.sha256(torch.as_tensor(values, dtype=torch.float64).cpu().numpy().tobytes()).hexdigest()
