"""Where train gradients are made, held and stored: the options, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refluence.cli.options import SolverName

if TYPE_CHECKING:
    from refluence.execution import Execution

_WHERE = "Where train gradients are made and held"
LOCAL = "local"
FACTORED = (SolverName.KFAC, SolverName.EKFAC)
"""The solvers that hold no rows of gradients; a store keeps the sums of their factors."""


class OffloadName(StrEnum):
    """Where train gradients are held."""

    NONE = "none"
    CPU = "cpu"
    DISK = "disk"


class StoreDtypeName(StrEnum):
    """The types in which a store may hold rows."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="PATH",
        help="Folder or URL that keeps them, of --solver sketched their projections: a killed run goes on from there, "
        "a later one makes new rows only.",
        rich_help_panel=_WHERE,
    ),
]
Offload = Annotated[
    OffloadName,
    typer.Option(
        "--offload",
        help="Hold them where they are made, in the CPU's memory, or in a temporary file.",
        rich_help_panel=_WHERE,
    ),
]
StoreDtype = Annotated[
    StoreDtypeName | None,
    typer.Option("--store-dtype", help="Of the stored rows; default: that of the gradients.", rich_help_panel=_WHERE),
]
ShardRows = Annotated[
    int | None,
    typer.Option(
        "--shard-rows",
        metavar="N",
        help="Rows of a file of the store, or of a worker's task; default: about 16 MB, some tasks a worker.",
        min=1,
        rich_help_panel=_WHERE,
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="ADDRESS",
        help="Work on the workers of a Dask scheduler, such as tcp://host:8786, or with local on one for each core "
        "here. They load built-in data sets themselves; a --task package.module must be importable there, a file.py "
        "is sent to them.",
        rich_help_panel=_WHERE,
    ),
]


@dataclass(frozen=True)
class ExecutionChoice:
    """What a run may use, as given on the command line; the names are the commands' parameters."""

    memory: str | None = None
    skip_bad: bool = False
    store: str | None = None
    offload: OffloadName = OffloadName.NONE
    store_dtype: StoreDtypeName | None = None
    shard_rows: int | None = None
    scheduler: str | None = None

    def check(self) -> None:
        """Look for what is wrong before anything is computed; connects to the scheduler of an address.

        Raises:
            typer.BadParameter: options that cannot be read or do not go together, no scheduler or workers there.
        """
        from refluence.distributed.clients import check_installed
        from refluence.distributed.parts_of import workers
        from refluence.errors import RefluenceError
        from refluence.store.places import open_place

        self.build()
        option = "--scheduler"
        try:
            if self.scheduler is not None:
                check_installed()
            # local workers are started when the user's function has been imported, and take its sys.path over
            if self.scheduler not in (None, LOCAL):
                workers(self.build())
            option = "--store"
            if self.store is not None:
                open_place(self.store)
        except RefluenceError as error:
            raise typer.BadParameter(str(error), param_hint=option) from error

    def check_solver(self, solver: SolverName) -> None:
        """Raise typer.BadParameter for an option about rows of gradients beside a solver that holds none."""
        if solver in FACTORED and self != self.without_rows():
            option = "--store-dtype" if self.offload is OffloadName.NONE else "--offload"
            raise typer.BadParameter(
                f"is about rows of gradients, and the {solver.value} solver holds none: leave it out", param_hint=option
            )

    def of_method(self, name: str, solver: SolverName) -> ExecutionChoice:
        """That of one method of several: without what its solver has not, and with a store of its own in the store."""
        choice = self.without_rows() if solver in FACTORED else self
        return choice if self.store is None else replace(choice, store=f"{self.store.rstrip('/')}/{name}")

    def without_rows(self) -> ExecutionChoice:
        """The same for a solver that holds no rows of gradients."""
        return replace(self, offload=OffloadName.NONE, store_dtype=None)

    def build(self) -> Execution:
        """What `rf.Influence` takes.

        Raises:
            typer.BadParameter: options that cannot be read or do not go together.
        """
        import torch

        from refluence.errors import RefluenceError
        from refluence.execution import Execution, parse_bytes

        if self.store_dtype is not None and self.store is None:
            raise typer.BadParameter("is of a store: add --store PATH", param_hint="--store-dtype")
        if self.shard_rows is not None and self.store is None and self.scheduler is None:
            raise typer.BadParameter(
                "is of the files of a store or the tasks of workers: add --store PATH or --scheduler ADDRESS",
                param_hint="--shard-rows",
            )
        try:
            if self.memory is not None and parse_bytes(self.memory) <= 0:
                raise typer.BadParameter(f"must be positive, not {self.memory!r}", param_hint="--memory")
        except RefluenceError as error:
            raise typer.BadParameter(str(error), param_hint="--memory") from error
        return Execution(
            memory=self.memory,
            offload=self.offload.value,
            store=self._store(),
            store_dtype=None if self.store_dtype is None else getattr(torch, self.store_dtype.value),
            shard_rows=self.shard_rows,
            skip_bad=self.skip_bad,
            cluster=self.scheduler,
        )

    def _store(self) -> str | None:
        """The store; where workers open it, not by a path from the folder in which each of them runs."""
        if self.store is None or self.scheduler is None or "://" in self.store:
            return self.store
        return str(Path(self.store).expanduser().absolute())
