"""Bad examples: what cannot be read, what the model or the loss raises on, and losses or gradients that are not finite.

A fit that leaves them out gives them weight 0 and lets a good row stand for them in the batches, so that they are not
read again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from refluence.batches import Batch, Batches
from refluence.columns import checked_weights
from refluence.errors import BadExampleError, DataError, NonFiniteError, RefluenceError
from refluence.execution import out_of_memory
from refluence.isolation import evaluation_mode
from refluence.progress import track
from refluence.task import Task

T = TypeVar("T")

SPREAD_ROWS = 16
"""Rows over the whole data that are tried before an error is believed to be about rows."""
LISTED = 3
REMEDY = "look at that example, or leave it out"


def bad_rows(
    task: Task, model: nn.Module, batches: Batches, progress: bool = True, most: int | None = None
) -> dict[int, str]:
    """Every bad row with what is wrong with it, the first `most` of them where that is given.

    A good batch costs one forward and one backward pass, and a bad one is halved until its bad rows are found. Rows are
    numbered as in `batches`, from 0. Empty also where rows spread over the whole data all raise: no row's fault then.
    A `stretch` is not asked that: all of it may be bad.

    Args:
        task: whose loss is taken.
        model: the task's model, or a copy of it.
        batches: the data.
        progress: whether a long search shows a bar.
        most: None: all of them.

    Raises:
        RefluenceError: a task that does not fit its model or data.
    """
    search = _Search(task, model, batches)
    found: dict[int, str] = {}
    with search.ready():
        for rows, wrong in track(search.batch_by_batch(), f"bad rows of {batches.name}", len(batches), progress):
            if wrong:
                none_good = len(found) == rows.start and batches.n == batches.whole
                if none_good and search.raises_everywhere():
                    return {}
                found.update(search.within(rows))
            if most is not None and len(found) >= most:
                break
    return dict(list(found.items())[:most])


def raises_everywhere(task: Task, model: nn.Module, batches: Batches) -> bool:
    """Whether rows that are spread over the whole data all raise, so that it is no row's fault."""
    search = _Search(task, model, batches)
    with search.ready():
        return search.raises_everywhere()


def refuse_bad(task: Task, model: nn.Module, batches: Batches, rows: Sequence[int]) -> None:
    """Raise the error of the first bad one of these rows, if there is one.

    Raises:
        BadExampleError: with its number in the whole data set.
    """
    search = _Search(task, model, batches)
    with search.ready():
        for row in rows:
            if (fault := search.read([row])) is not None:
                raise fault


def leaving_out(
    work: Callable[[dict[int, str]], T],
    look: Callable[[int | None], dict[int, str]],
    skip: bool,
    seen: Callable[[T], bool],
) -> T:
    """`work(rows left out, with their reasons)`, again where it meets a bad example.

    Args:
        work: what is done with the rows that are left.
        look: `bad_rows` of the data, the first so many or None for all.
        skip: whether bad examples are left out.
        seen: whether `work` has met every row; where it has not, and no bad row is known, they are looked for.

    Raises:
        BadExampleError: a bad example, where none is to be left out.
    """
    left_out: dict[int, str] = {}
    while True:
        try:
            made = work(left_out)
        except Exception as error:
            known = left_out
            left_out = {**known, **_blamed(error, look, skip)}
            if len(left_out) == len(known):
                raise
            continue
        if left_out or not skip or seen(made):
            return made
        left_out = look(None)
        if not left_out:
            return made


def _blamed(error: Exception, look: Callable[[int | None], dict[int, str]], skip: bool) -> dict[int, str]:
    """The rows that an error is about, none where it is about no row; without `skip` it is raised with the first."""
    named = {error.row: error.reason} if isinstance(error, BadExampleError) else {}
    if (isinstance(error, RefluenceError) or out_of_memory(error)) and not (named and skip):
        return {}
    if skip:
        return {**named, **look(None)}
    for row, reason in look(1).items():
        raise BadExampleError(f"train row {row} is bad: {reason}: {REMEDY}", row, reason) from error
    return {}


def replaced(batches: Batches, left_out: Collection[int]) -> Batches:
    """The batches with the first good row in place of those left out.

    Raises:
        DataError: no row is left.
    """
    return batches.replacing(left_out, good_rows(batches, left_out, 1)[0]) if left_out else batches


def good_rows(batches: Batches, left_out: Collection[int], count: int) -> list[int]:
    """The first so many rows that are not left out.

    Raises:
        DataError: no row is left.
    """
    found: list[int] = []
    for row in range(batches.n):
        if len(found) == count:
            break
        if row not in left_out:
            found.append(row)
    if found:
        return found
    reasons = f": {_listed(left_out)}" if isinstance(left_out, Mapping) else ""
    raise DataError(f"all {batches.n} examples of the {batches.name} are bad, so that none is left{reasons}")


def weights_without(
    weights: Sequence[float] | Tensor | None, left_out: Collection[int], n: int
) -> Float64[Tensor, " n"] | None:
    """The weights of a fit, 0 for the rows that are left out; None where all are 1.

    Raises:
        DataError: wrong weights.
    """
    checked = None if weights is None else checked_weights(weights, n)
    if not left_out:
        return checked
    checked = torch.ones(n, dtype=torch.float64) if checked is None else checked.clone()
    checked[sorted(left_out)] = 0.0
    return checked


def sentence(left_out: Mapping[int, str], n: int) -> str:
    """How many rows are left out, and the first of them with their reasons."""
    examples = "example is" if len(left_out) == 1 else "examples are"
    return f"{len(left_out):,} of {n:,} training {examples} left out: {_listed(left_out)}"


def _listed(left_out: Mapping[int, str]) -> str:
    named = [f"row {row} ({left_out[row]})" for row in sorted(left_out)[:LISTED]]
    return ", ".join(named) + (f" and {len(left_out) - LISTED:,} more" if len(left_out) > LISTED else "")


@dataclass(frozen=True, eq=False)
class _Search:
    """The rows of a data set, put to the loss and to one backward pass."""

    task: Task
    model: nn.Module
    batches: Batches

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        names = set(self.task.parameter_names())
        return {name: parameter for name, parameter in self.model.named_parameters() if name in names}

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The model in eval mode with only the attributed parameters requiring gradients, and given back as it was."""
        with evaluation_mode(self.model), torch.enable_grad():
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in self.parameters)
            yield

    def batch_by_batch(self) -> Iterator[tuple[range, bool]]:
        """(rows, whether there is something wrong with them) of one batch after the other."""
        n, size, at = self.batches.n, self.batches.batch_size, 0
        while at < n:
            waiting = iter(self.batches.holding([(at, n)]))
            for start in range(at, n, size):
                rows = range(start, min(start + size, n))
                at = rows.stop
                try:
                    _, batch = next(waiting)
                except Exception as error:
                    if out_of_memory(error):
                        raise
                    yield rows, True
                    break
                yield rows, self.fault(batch, rows.start) is not None

    def raises_everywhere(self) -> bool:
        """Whether rows that are spread over the whole data all raise."""
        n = self.batches.n
        spread = sorted({i * (n - 1) // (SPREAD_ROWS - 1) for i in range(SPREAD_ROWS)})
        faults = (self.read([row]) for row in spread)
        return all(fault is not None and not isinstance(fault, NonFiniteError) for fault in faults)

    def within(self, rows: range) -> Iterator[tuple[int, str]]:
        """The bad ones of these rows."""
        fault = self.read(rows)
        if fault is None:
            return
        if len(rows) == 1:
            yield rows[0], fault.reason
            return
        half = len(rows) // 2
        yield from self.within(rows[:half])
        yield from self.within(rows[half:])

    def read(self, rows: Sequence[int]) -> BadExampleError | None:
        """What is wrong with these rows, read by themselves."""
        try:
            batch = self.batches.select(rows)
        except Exception as error:
            if out_of_memory(error):
                raise
            return self._raised(f"reading it raises {_in_words(error)}", rows[0], error)
        return self.fault(batch, rows[0])

    def fault(self, batch: Batch, start: int) -> BadExampleError | None:
        """What is wrong with a batch; its number is right where the batch is a single row."""
        try:
            values = self.task.losses(self.task.output(self.model, batch), batch)
            finite = torch.isfinite(values)
            if not bool(finite.all()):
                at = int((~finite).nonzero()[0])
                return self._not_finite(f"the loss is {values[at].item()}", start + at)
            gradients = self._gradients(values)
        except Exception as error:
            if isinstance(error, RefluenceError) or out_of_memory(error):
                raise
            return self._raised(f"the model or the loss raises {_in_words(error)}", start, error)
        # A sum is finite only where all its terms are.
        for name, gradient in gradients.items():
            if not bool(torch.isfinite(gradient).all()):
                return self._not_finite(f"the gradient with respect to {name} has NaN or Inf", start)
        return None

    def _gradients(self, values: Tensor) -> dict[str, Tensor]:
        if not values.requires_grad:
            return {}
        found = torch.autograd.grad(values.sum(), list(self.parameters.values()), allow_unused=True)
        return {name: one for name, one in zip(self.parameters, found, strict=True) if one is not None}

    def _not_finite(self, reason: str, row: int) -> NonFiniteError:
        row += self.batches.first
        return NonFiniteError(f"{self.batches.name} row {row} is bad: {reason}: {REMEDY}", row, reason)

    def _raised(self, reason: str, row: int, cause: Exception) -> BadExampleError:
        row += self.batches.first
        error = BadExampleError(f"{self.batches.name} row {row} is bad: {reason}: {REMEDY}", row, reason)
        error.__cause__ = cause
        return error


def _in_words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
