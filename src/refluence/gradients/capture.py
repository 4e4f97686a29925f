"""Per-example gradients of a task's model: one forward and one backward pass a batch wherever the use is known.

How each parameter's gradient is made is decided on a few probe rows by comparing with gradients of single examples
(`routes.py`), and compared again on a row or two of every batch (every 16 rows of smaller ones; four where the model
selects or reorders rows). What does not agree is made by single backward passes for that batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from refluence.batches import Batches, rows_of, slice_rows
from refluence.errors import NonFiniteError
from refluence.gradients.agreement import agree
from refluence.gradients.blocks import DenseBlock, GradientBlock, ZeroBlock
from refluence.gradients.checks import check_independent
from refluence.gradients.coverage import Coverage, ParameterCoverage
from refluence.gradients.extraction import LayoutError, Owner, extract
from refluence.gradients.fan import FanBlock
from refluence.gradients.functional import Objective, single_gradients, vectorised_gradients
from refluence.gradients.joint import JointBlock
from refluence.gradients.matrices import LayerMatrix
from refluence.gradients.recording import record
from refluence.gradients.routes import Groups, Route, Router
from refluence.isolation import evaluation_mode
from refluence.task import Task

Columns = tuple[tuple[int, int, int], ...]
"""(first column in the block, length, first column in the group) of each stretch."""

PROBE_ROWS = 3
ROWS_PER_CHECK = 16
CHECKED_TWICE = 64
CHECKED_ROWS = 4
GOLDEN = (5**0.5 - 1) / 2


class Capture:
    """Makes gradient blocks, batch by batch.

    Args:
        task: what is differentiated.
        model: the task's model, or a copy of it on another device or in another dtype.
        groups: name → parameters of each curvature block; a layer's weight and bias stay together within one.
        probe: the data whose first rows decide how each gradient is made.

    Raises:
        TaskError: a loss that depends on the other examples of its batch.
        NonDeterministicError: two equal forward passes that differ.
    """

    def __init__(self, task: Task, model: nn.Module, groups: Groups, probe: Batches) -> None:
        self.task, self.model, self.groups = task, model, groups
        names = [name for group in groups.values() for name in group]
        self.parameters = {name: p for name, p in model.named_parameters() if name in set(names)}
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        with self.ready():
            router = Router(model, self.parameters, groups, self.loss)
            self.routes = router.choose(probe.select(range(min(PROBE_ROWS, probe.n))))

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The model in eval mode with only the attributed parameters requiring gradients, and given back as it was."""
        with evaluation_mode(self.model), torch.enable_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad != (name in self.parameters):
                    parameter.requires_grad_(name in self.parameters)
            yield

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The training losses of a batch as an objective."""
        return self.task.losses(self.task.output(model, batch), batch)

    def measurement(self, model: nn.Module, batch: Any) -> Tensor:
        """The measurements of a batch as an objective."""
        return self.task.measurements(self.task.output(model, batch), batch)

    def gradients(
        self, batches: Batches, objective: Objective, q: int = 1
    ) -> Iterator[tuple[int, dict[str, JointBlock]]]:
        """(first row, group → gradients) over a data set.

        An objective of q > 1 values an example gives q gradients for each, those of the first value for all examples of
        the batch first.

        Raises:
            NonFiniteError: NaN or Inf in a loss or gradient.
            TaskError: a measurement that depends on the other examples of its batch.
        """
        if objective == self.measurement:
            with self.ready():
                probe = batches.select(range(min(PROBE_ROWS, batches.n)))
                check_independent(self.model, objective, probe, batches.name, "measurement")
        for start, batch in self.running(batches):
            with self.ready():
                blocks = self._grouped(batch, objective, batches.first + start, batches.name, q)
            yield start, blocks

    def running(self, batches: Batches) -> Iterator[tuple[int, Any]]:
        """(first row, batch), read with the model ready, which is given back also when whoever takes them stops."""
        waiting = iter(batches)
        while True:
            with self.ready():
                taken = next(waiting, None)
            if taken is None:
                return
            yield taken

    @property
    def coverage(self) -> Coverage:
        """Which parameters are attributed, and how."""
        kinds = {name: route.kind for route in self.routes for name in route.owner.names}
        return Coverage(
            tuple(
                ParameterCoverage(
                    name,
                    parameter.numel(),
                    kinds.get(name),
                    "" if name in kinds else self._why_not(name),
                )
                for name, parameter in self.model.named_parameters()
            )
        )

    def _why_not(self, name: str) -> str:
        frozen = not dict(self.task.model.named_parameters())[name].requires_grad
        return "frozen (requires_grad is False)" if frozen else "left out by `parameters`"

    def _grouped(self, batch: Any, objective: Objective, start: int, data: str, q: int) -> dict[str, JointBlock]:
        blocks = self._blocks(batch, objective, start, data, q)
        grouped = {}
        for group, layers in self.layout.items():
            grouped[group] = JointBlock(
                tuple(blocks[route.owner] for route, _ in layers), tuple(columns for _, columns in layers)
            )
        return grouped

    @cached_property
    def layout(self) -> dict[str, tuple[tuple[Route, Columns], ...]]:
        """Group → (route, where its columns go in the group's) of its blocks, in the order of `JointBlock.blocks`."""
        found = {}
        for group, names in self.groups.items():
            offsets, total = {}, 0
            for name in names:
                offsets[name] = total
                total += self.shapes[name].numel()
            layers = []
            for route in self.routes:
                if route.owner.names[0] not in offsets:
                    continue
                own, columns = 0, []
                for name in route.owner.names:
                    size = self.shapes[name].numel()
                    columns.append((own, size, offsets[name]))
                    own += size
                layers.append((route, tuple(columns)))
            found[group] = tuple(layers)
        return found

    def matrices(self, group: str) -> tuple[LayerMatrix, ...]:
        """The layers of a group as matrices, in the order of `JointBlock.blocks`."""
        found = []
        for route, stretches in self.layout[group]:
            names, shape = route.owner.names, self.shapes[route.owner.names[0]]
            outer = route.kind == "outer"
            rows = shape[0] if outer else shape.numel()
            columns = shape.numel() // rows if outer else 1
            found.append(LayerMatrix(names, rows, columns, len(names) > 1, outer, stretches))
        return tuple(found)

    def _blocks(self, batch: Any, objective: Objective, start: int, data: str, q: int) -> dict[Owner, GradientBlock]:
        n = rows_of(batch)
        blocks: dict[Owner, GradientBlock] = {}
        left: dict[str, list[Owner]] = {"vmap": [], "single": []}
        recorded = [route for route in self.routes if route.kind in ("outer", "rows", "unused")]
        if recorded:
            recording, columns = record(self.model, self.parameters, objective, batch, start, data)
            used = recording.used
            for route in recorded:
                try:
                    if route.kind == "unused" and not used & set(route.owner.names):
                        parameter = self.parameters[route.owner.names[0]]
                        blocks[route.owner] = ZeroBlock(q * n, parameter.numel(), parameter.detach())
                        continue
                    if route.kind == "unused" or recording.unknown & set(route.owner.names):
                        raise LayoutError("a use that no rule knows, or that the probe did not show")
                    blocks[route.owner] = extract(route.owner, recording.uses, columns, self.shapes, route.layout, n)
                except LayoutError:
                    left["single"].append(route.owner)
            left["single"] += self._disagreeing(blocks, batch, objective, start, recording.reorders)
        for route in self.routes:
            if route.kind in left:
                left[route.kind].append(route.owner)
        for kind, owners in left.items():
            blocks |= self._fallback(kind, owners, batch, objective, q)
        for owner, block in blocks.items():
            if (row := block.nonfinite_row()) is not None:
                raise NonFiniteError(
                    f"the gradient of {data} row {start + row} with respect to {' and '.join(owner.names)} has NaN or "
                    "Inf: look at that example, or leave it out",
                    start + row,
                    f"the gradient with respect to {' and '.join(owner.names)} has NaN or Inf",
                )
        return blocks

    def _disagreeing(
        self, blocks: Mapping[Owner, GradientBlock], batch: Any, objective: Objective, start: int, reorders: bool
    ) -> list[Owner]:
        """The owners whose gradients of a few rows of this batch are not those of the single examples.

        A layout can fit the probe and be wrong later, where a model selects, packs or reorders what it computes on.
        """
        n, q = rows_of(batch), next(iter(blocks.values())).n // rows_of(batch) if blocks else 1
        flattened = any(route.layout.startswith("batch-") for route in self.routes)
        next_check = -(-start // ROWS_PER_CHECK) * ROWS_PER_CHECK - start
        if next_check >= n and not reorders and not flattened:
            return []
        count = CHECKED_ROWS if reorders else 2 if n >= CHECKED_TWICE else 1
        # Rows spread by a fixed irrational step: the same rows in every run, and no row position is favoured.
        chosen = sorted({int((start * GOLDEN % 1 + i * GOLDEN) % 1 * n) for i in range(1, count + 1)})
        names = [name for owner in blocks for name in owner.names]
        wrong: list[Owner] = []
        for row in chosen:
            column = (start + row) % q
            single = column_of(objective, column) if q > 1 else objective
            reference = single_gradients(self.model, single, names, slice_rows(batch, row, row + 1))
            whole = torch.stack([gradient.double().norm() for gradient in reference.values()]).norm()[None]
            at = column * n + row
            for owner, block in blocks.items():
                if owner not in wrong:
                    expected = torch.cat([reference[name] for name in owner.names], dim=1)
                    if not agree(block.rows(at, at + 1).dense(), expected, whole):
                        wrong.append(owner)
        return wrong

    def _fallback(
        self, kind: str, owners: Sequence[Owner], batch: Any, objective: Objective, q: int
    ) -> dict[Owner, GradientBlock]:
        if not owners:
            return {}
        names = [name for owner in owners for name in owner.names]
        columns = []
        for c in range(q):
            single = column_of(objective, c) if q > 1 else objective
            rows = None
            if kind == "vmap":
                # A measurement may hold what vmap cannot follow though the loss does not.
                with suppress(RuntimeError):
                    rows = vectorised_gradients(self.model, single, names, batch)
            columns.append(single_gradients(self.model, single, names, batch) if rows is None else rows)
        made: dict[Owner, GradientBlock] = {}
        for owner in owners:
            parts = tuple(DenseBlock(torch.cat([rows[name] for name in owner.names], dim=1)) for rows in columns)
            made[owner] = parts[0] if q == 1 else FanBlock(parts)
        return made


def column_of(objective: Objective, column: int) -> Objective:
    """One of the values that an objective gives for each example."""
    return lambda model, batch: objective(model, batch)[:, column]
