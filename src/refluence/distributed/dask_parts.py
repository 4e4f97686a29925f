"""Parts on the workers of a Dask cluster."""

from __future__ import annotations

import contextlib
import itertools
import uuid
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import cloudpickle
import torch
from torch import Tensor

from refluence.distributed.recipe import Recipe, Rows
from refluence.distributed.worker import run, summed
from refluence.errors import ClusterError
from refluence.execution import format_bytes
from refluence.gradients.kernels import held_blocks
from refluence.gradients.parts import Parts, Pass, Tree, joined
from refluence.progress import track

if TYPE_CHECKING:
    from distributed import Client, Future

FAN = 4
"""Results that are added together at a time: partial sums wait in the workers' memories until they are."""
ATTEMPTS = 8
LARGEST_SENT = 256 << 20


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
        workers = worker_addresses(client)
        self.owners = [workers[i * len(workers) // len(self.rows)] for i in range(len(self.rows))]
        self.among = -(-len(self.rows) // len(workers))
        self._numbers = itertools.count()
        self._lost = 0
        self._recipe = self._sent(cloudpickle.dumps(recipe))

    def total(self, of: str, function: Pass, *given: Any) -> Tree:
        """The sum over the stretches, added by fours on the workers in the order of the rows."""
        sent = self._sent(cloudpickle.dumps(given))
        while True:
            sums = _Sums(self._add)
            leaves = []
            for i in range(len(self.rows)):
                leaves.append(self._submit(i, of, function, sent))
                sums.append(leaves[-1])
            total = sums.total()
            found = self._awaited(leaves, release=True)
            try:
                if found is not None:
                    return total.result()
            except Exception as error:
                self._heal([], error)

    def by_row(self, of: str, function: Pass, *given: Any) -> Tree:
        """What the stretches give, one below the other."""
        sent = self._sent(cloudpickle.dumps(given))
        return joined(self._all(lambda i: self._submit(i, of, function, sent), [[i] for i in range(len(self.rows))]))

    def gram(self, of: str, function: Pass, groups: Sequence[str]) -> dict[str, Tensor]:
        """Every pair of stretches, the gradients of one sent from worker to worker."""
        groups = list(groups)
        alone, among = self._sent(cloudpickle.dumps((None, groups))), self._sent(cloudpickle.dumps(()))
        named = self._sent(cloudpickle.dumps((groups,)))
        blocks = [self._submit(i, of, held_blocks, named) for i in range(len(self.rows))]
        pairs = [(i, j) for i in range(len(self.rows)) for j in range(i + 1)]

        def submit(number: int) -> Future:
            i, j = pairs[number]
            if i == j:
                return self._submit(i, of, function, alone)
            return self._submit(i, of, function, among, (blocks[j], groups))

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

    def _sent(self, data: bytes) -> Future:
        """Bytes that the scheduler can give to every worker that ever asks, also when all that had them are gone."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sending large graph")
            return self.client.submit(bytes, data, key=self._name("given"), pure=False)

    def _name(self, what: str) -> str:
        return f"{what}-{self.key}-{next(self._numbers)}"

    def _submit(self, i: int, of: str, function: Pass, given: Future, more: Any = ()) -> Future:
        return self.client.submit(
            run,
            self.key,
            self._recipe,
            self.rows[i],
            self.sizes[i],
            self.among,
            of,
            function,
            given,
            more,
            key=self._name(function.__name__.strip("_")),
            workers=[self.owners[i]],
            allow_other_workers=True,
            pure=False,
        )

    def _add(self, parts: Sequence[Future]) -> Future:
        return self.client.submit(summed, list(parts), key=self._name("sum"), pure=False)

    def _all(self, submit: Callable[[int], Future], parts: Sequence[Sequence[int]]) -> list[Tree]:
        """The results of the submitted tasks, of which the n-th needs the stretches `parts[n]`."""
        while True:
            found = self._awaited([submit(number) for number in range(len(parts))], parts=parts)
            if found is not None:
                return found

    def _awaited(
        self, futures: list[Future], release: bool = False, parts: Sequence[Sequence[int]] | None = None
    ) -> list[Tree] | None:
        """Wait for all, with their results unless only to be released; None where all are to be tried again."""
        from distributed import as_completed

        found: list[Tree] = [None] * len(futures)
        number_of = {future.key: number for number, future in enumerate(futures)}
        done = as_completed(futures)
        try:
            futures.clear()
            for future in track(done, "parts of the data", len(number_of), self.progress):
                number = number_of[future.key]
                if release and future.status == "finished":
                    continue
                found[number] = future.result()
        except Exception as error:
            left = [future for future in done.futures if not future.done()]
            with contextlib.suppress(Exception):
                self.client.cancel(left, force=True)
            self._heal([number] if parts is None else parts[number], error)
            return None
        self._lost = 0
        return found

    def _heal(self, parts: Sequence[int], error: BaseException) -> None:
        """Prepare for another attempt where workers died, or raise the error where it is another one.

        Raises:
            ClusterError: too many attempts, or no worker is left.
        """
        from distributed import KilledWorker
        from distributed.client import FutureCancelledError
        from distributed.comm.core import CommClosedError

        if not isinstance(error, (KilledWorker, FutureCancelledError, CommClosedError)):
            raise error
        self._lost += 1
        if self._lost > ATTEMPTS or not self.client.scheduler_info(n_workers=1)["workers"]:
            named = [f"{self.rows[i][0]} to {self.rows[i][1] - 1}" for i in parts]
            raise ClusterError(
                f"a pass over the data was lost {self._lost} times with the workers that made it, the last time at "
                f"rows {' and '.join(named) or 'unknown'} ({error}). Give the workers more memory, or look at "
                "their logs"
            ) from error
        if isinstance(error, KilledWorker):
            for i in parts:
                self.sizes[i] = max(1, self.sizes[i] // 2)


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


def worker_addresses(client: Client) -> list[str]:
    """One address for each thread of each worker.

    Raises:
        ClusterError: there is none.
    """
    workers = client.scheduler_info(n_workers=-1)["workers"]
    found = [address for address, worker in sorted(workers.items()) for _ in range(worker["nthreads"])]
    if not found:
        raise ClusterError(
            "the cluster has no workers: start some (cluster.scale(2), or `dask worker ADDRESS`), and wait for them "
            "with client.wait_for_workers(1)"
        )
    return found


def cluster_memory(client: Client) -> int:
    """Bytes of all the workers' memories together."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return sum(int(worker["memory_limit"] or 0) for worker in workers)


def check_sendable(size: int, what: str) -> None:
    """Refuse to send data that workers can load themselves.

    Raises:
        ClusterError: with the remedy.
    """
    if size > LARGEST_SENT:
        raise ClusterError(
            f"{what} has {format_bytes(size)} in this process, and every worker would be sent all of it: give fit a "
            f"function that loads it (workers call it once), or a Dataset that reads its rows from files; up to "
            f"{format_bytes(LARGEST_SENT)} are sent"
        )
