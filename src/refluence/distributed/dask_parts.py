"""Parts on the workers of a Dask cluster."""

from __future__ import annotations

import contextlib
import itertools
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import cloudpickle
import torch
from torch import Tensor

from refluence.distributed.cluster import threads
from refluence.distributed.placement import Placement
from refluence.distributed.recipe import Recipe, Rows
from refluence.distributed.worker import Order, bad_rows_of, run, summed
from refluence.errors import ClusterError
from refluence.gradients.kernels import held_blocks
from refluence.gradients.parts import Parts, Pass, Tree, joined
from refluence.progress import track

if TYPE_CHECKING:
    from distributed import Client, Future

FAN = 4
"""Results that are added together at a time: partial sums wait in the workers' memories until they are."""
ATTEMPTS = 8
PATIENCE_SECONDS = 120.0
"""That a cluster may be without any worker."""
SECONDS_BETWEEN_LOOKS = 5.0
SECONDS_FOR_NEWS = 0.2
LISTED = 3


class DaskParts(Parts):
    """Stretches of the rows on the workers of a Dask cluster, one task a stretch and pass.

    A stretch goes to the same worker every time as long as that lives, where its model, data and gradients still are;
    any other worker makes them again. A task that a dying worker took with it is repeated elsewhere; where that happens
    to a stretch again and again, as by a memory limit, its batches are halved.

    Args:
        client: of the cluster.
        recipe: of the train side.
        rows: the stretches, in order.
        progress: whether long passes show a bar.

    Raises:
        ClusterError: no workers.
    """

    def __init__(self, client: Client, recipe: Recipe, rows: Sequence[Rows], progress: bool) -> None:
        self.client, self.rows, self.progress = client, list(rows), progress
        self.key = f"refluence-{uuid.uuid4().hex[:12]}"
        self.sizes = [recipe.batch_size] * len(self.rows)
        self.placement = Placement(threads(client), len(self.rows))
        self._numbers = itertools.count()
        self._lost = 0
        self._recipe = self._sent(cloudpickle.dumps(recipe))

    def total(self, of: str, function: Pass, *given: Any) -> Tree:
        """The sum over the stretches, added by fours on the workers in the order of the rows."""
        sent = self._sent(cloudpickle.dumps(given))
        while True:
            self._begin()
            sums = _Sums(self._add)
            leaves = []
            for i in range(len(self.rows)):
                leaves.append(self._submit(i, of, function, sent))
                sums.append(leaves[-1])
            total = sums.total()
            if self._awaited(leaves, [[i] for i in range(len(self.rows))], release=True) is None:
                continue
            found = self._awaited([total], [[]])
            if found is not None:
                self._lost = 0
                return found[0]

    def by_row(self, of: str, function: Pass, *given: Any) -> Tree:
        """What the stretches give, one below the other."""
        sent = self._sent(cloudpickle.dumps(given))
        every = range(len(self.rows))
        return joined(self._all(lambda: [self._submit(i, of, function, sent) for i in every], [[i] for i in every]))

    def gram(self, of: str, function: Pass, groups: Sequence[str]) -> dict[str, Tensor]:
        """Every pair of stretches, the gradients of one sent from worker to worker."""
        groups = list(groups)
        alone, among = self._sent(cloudpickle.dumps((None, groups))), self._sent(cloudpickle.dumps(()))
        named = self._sent(cloudpickle.dumps((groups,)))
        pairs = [(i, j) for i in range(len(self.rows)) for j in range(i + 1)]

        def submit() -> list[Future]:
            blocks = [self._submit(i, of, held_blocks, named) for i in range(len(self.rows))]
            return [
                self._submit(i, of, function, alone)
                if i == j
                else self._submit(i, of, function, among, (blocks[j], groups))
                for i, j in pairs
            ]

        found = self._all(submit, [[i, j] for i, j in pairs])
        starts = [first for first, _ in self.rows]
        q = found[0][groups[0]].shape[0] // (self.rows[0][1] - self.rows[0][0])
        size = q * self.rows[-1][1]
        grams = {group: torch.empty(size, size, dtype=torch.float64) for group in groups}
        for (i, j), products in zip(pairs, found, strict=True):
            for group, gram in grams.items():
                part = products[group]
                here = slice(q * starts[i], q * starts[i] + part.shape[0])
                there = slice(q * starts[j], q * starts[j] + part.shape[1])
                gram[here, there] = part
                gram[there, here] = part.T
        return grams

    def bad_rows(self, most: int | None) -> dict[int, str]:
        """Every bad row by its number in the whole data set, with what is wrong; the first `most` where that is given.

        No capture is made for it, so that bad rows among those that decide how gradients are made do not matter.
        """

        every = range(len(self.rows))
        found = self._all(lambda: [self._at_home(i, bad_rows_of, "", "", most) for i in every], [[i] for i in every])
        return dict([item for part in found for item in part.items()][:most])

    def _sent(self, data: bytes) -> Future:
        """Bytes that the scheduler can give to every worker that ever asks, also when all that had them are gone."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sending large graph")
            return self.client.submit(bytes, data, key=self._name("given"), pure=False)

    def _name(self, what: str) -> str:
        return f"{what}-{self.key}-{next(self._numbers)}"

    def _submit(self, i: int, of: str, function: Pass, given: Future, more: Any = ()) -> Future:
        return self._at_home(i, run, of, str(given.key), function, given, more)

    def _at_home(self, i: int, what: Callable[..., Any], of: str, given: str, *arguments: Any) -> Future:
        home, most = self.placement.homes[i], self.placement.most
        order = Order(self.key, self.rows[i], self.sizes[i], most, home, of, given)
        function = arguments[0] if callable(arguments[0]) else what
        return self.client.submit(
            what,
            order,
            self._recipe,
            *arguments,
            key=self._name(function.__name__.strip("_")),
            workers=[home],
            allow_other_workers=True,
            pure=False,
        )

    def _add(self, parts: Sequence[Future]) -> Future:
        return self.client.submit(summed, list(parts), key=self._name("sum"), pure=False)

    def _begin(self) -> None:
        """New homes for the stretches whose workers are gone."""
        self.placement.renew(self._workers())

    def _workers(self) -> dict[str, int]:
        """Those that are there now, with their threads.

        Raises:
            ClusterError: the scheduler does not answer.
        """
        try:
            return dict(self.client.nthreads())
        except (OSError, TimeoutError, CancelledError, RuntimeError) as error:
            raise ClusterError(
                f"the scheduler of the cluster no longer answers ({_in_words(error)}): start it again, and fit again "
                "with a new client; a store keeps what was made"
            ) from error

    def _all(self, submit: Callable[[], list[Future]], parts: Sequence[Sequence[int]]) -> list[Tree]:
        """The results of the submitted tasks, of which the n-th needs the stretches `parts[n]`."""
        while True:
            self._begin()
            found = self._awaited(submit(), parts)
            if found is not None:
                self._lost = 0
                return found

    def _awaited(
        self, futures: list[Future], parts: Sequence[Sequence[int]], release: bool = False
    ) -> list[Tree] | None:
        """Wait for all, with their results unless only to be released; None where all are to be tried again."""
        found: list[Tree] = [None] * len(futures)
        number_of = {str(future.key): number for number, future in enumerate(futures)}
        waiting = {str(future.key): future for future in futures}
        futures.clear()
        try:
            done = self._finished(waiting)
            for future in track(done, "parts of the data", len(number_of), self.progress and len(number_of) > 1):
                if not (release and future.status == "finished"):
                    found[number_of[str(future.key)]] = future.result()
        except Exception as error:
            time.sleep(SECONDS_FOR_NEWS)
            failed = [number_of[key] for key, future in waiting.items() if future.status == "error"]
            with contextlib.suppress(Exception):
                self.client.cancel([f for f in waiting.values() if not f.done()], force=True)
            self._heal({i for number in failed for i in parts[number]}, error)
            return None
        return found

    def _finished(self, waiting: dict[str, Future]) -> Iterator[Future]:
        """The futures as they are done, each taken out of `waiting` after it was used.

        Raises:
            ClusterError: there have been no workers for a while.
        """
        from distributed import as_completed

        seen = time.monotonic()
        while waiting:
            try:
                for future in as_completed(waiting.values(), timeout=min(SECONDS_BETWEEN_LOOKS, PATIENCE_SECONDS)):
                    seen = time.monotonic()
                    yield future
                    del waiting[str(future.key)]
            except TimeoutError:
                if self._workers():
                    seen = time.monotonic()
                elif time.monotonic() - seen > PATIENCE_SECONDS:
                    raise ClusterError(
                        "the cluster has lost all its workers: start some, and fit again; a store keeps what was made"
                    ) from None

    def _heal(self, parts: Iterable[int], error: BaseException) -> None:
        """Prepare for another attempt where workers died, or raise the error where it is another one.

        Args:
            parts: the stretches whose tasks failed.

        Raises:
            ClusterError: too many attempts, or workers that die of single rows.
        """
        from distributed import KilledWorker
        from distributed.comm.core import CommClosedError

        if not isinstance(error, (KilledWorker, CancelledError, CommClosedError)):
            raise error
        parts = sorted(parts)
        smaller = [i for i in parts if self.sizes[i] > 1]
        if isinstance(error, KilledWorker) and smaller:
            for i in smaller:
                self.sizes[i] //= 2
            return
        self._lost += 1
        of_memory = isinstance(error, KilledWorker) and parts
        if of_memory or self._lost > ATTEMPTS:
            rows = " and ".join(f"{self.rows[i][0]} to {self.rows[i][1] - 1}" for i in parts[:LISTED])
            many = f" and {len(parts) - LISTED} more stretches" if len(parts) > LISTED else ""
            batches = ", with one row a batch" if of_memory else f" {self._lost} times"
            raise ClusterError(
                f"the workers that made train rows {rows or 'of a sum'}{many} died{batches} ({_in_words(error)}): "
                "give the workers more memory, or look at their logs"
            ) from error


class _Sums:
    """Sums of sums of at most `FAN` results, in their order, each asked for as soon as its terms are.

    So no more than FAN results a level wait in the workers' memories.
    """

    def __init__(self, add: Callable[[Sequence[Future]], Future]) -> None:
        self.add = add
        self.levels: list[list[Future]] = []

    def append(self, result: Future, level: int = 0) -> None:
        """One more term."""
        if level == len(self.levels):
            self.levels.append([])
        self.levels[level].append(result)
        if len(self.levels[level]) == FAN:
            terms, self.levels[level] = self.levels[level], []
            self.append(self.add(terms), level + 1)

    def total(self) -> Future:
        """The sum of all terms."""
        terms = [term for level in reversed(self.levels) for term in level]
        return terms[0] if len(terms) == 1 else self.add(terms)


def _in_words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
