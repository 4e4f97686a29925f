"""Per-example gradients of a task's model: one forward and one backward pass a batch wherever the use is known.

How each parameter's gradient is made is decided once, on a few probe rows, by comparing with gradients of single
examples. So an unforeseen use of a weight, a flattened batch dimension or a model that mixes its examples shows
there, and not in the scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refluence.batches import Batches, rows_of, slice_rows
from refluence.errors import NonDeterministicError, NonFiniteError, TaskError
from refluence.gradients.blocks import DenseBlock, GradientBlock, JointBlock
from refluence.gradients.coverage import Coverage, ParameterCoverage
from refluence.gradients.extraction import LAYOUTS, LayoutError, Owner, extract, is_outer
from refluence.gradients.functional import Objective, single_gradients, vectorised_gradients
from refluence.gradients.recorder import Recorder, Recording
from refluence.isolation import evaluation_mode
from refluence.task import Task

PROBE_ROWS = 3

Groups = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Route:
    """How the gradients of one owner's parameters are made."""

    owner: Owner
    kind: str
    layout: str = "first"


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
        with self._ready():
            self.routes = self._choose(probe.select(range(min(PROBE_ROWS, probe.n))))

    @contextmanager
    def _ready(self) -> Iterator[None]:
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

    def gradients(self, batches: Batches, objective: Objective) -> Iterator[tuple[int, dict[str, JointBlock]]]:
        """(first row, group → gradients) over a data set.

        Raises:
            NonFiniteError: NaN or Inf in a loss or gradient.
        """
        waiting = iter(batches)
        while True:
            # Entered for each batch, so that the model is given back also when whoever takes the blocks stops midway.
            with self._ready():
                taken = next(waiting, None)
                if taken is None:
                    return
                start, batch = taken
                blocks = self._grouped(batch, objective, start, batches.name)
            yield start, blocks

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

    def _grouped(self, batch: Any, objective: Objective, start: int, data: str) -> dict[str, JointBlock]:
        blocks = self._blocks(batch, objective, start, data)
        grouped = {}
        for group, names in self.groups.items():
            offsets, total = {}, 0
            for name in names:
                offsets[name] = total
                total += self.shapes[name].numel()
            chosen = [route for route in self.routes if route.owner.names[0] in offsets]
            columns = []
            for route in chosen:
                own, stretches = 0, []
                for name in route.owner.names:
                    size = self.shapes[name].numel()
                    stretches.append((own, size, offsets[name]))
                    own += size
                columns.append(tuple(stretches))
            grouped[group] = JointBlock(tuple(blocks[route.owner] for route in chosen), tuple(columns))
        return grouped

    def _blocks(self, batch: Any, objective: Objective, start: int, data: str) -> dict[Owner, GradientBlock]:
        n = rows_of(batch)
        blocks: dict[Owner, GradientBlock] = {}
        left: dict[str, list[Owner]] = {"vmap": [], "single": []}
        recorded = [route for route in self.routes if route.kind in ("outer", "rows", "unused")]
        if recorded:
            recording, errors = self._recorded(batch, objective, start, data)
            used = recording.used
            for route in recorded:
                try:
                    if route.kind == "unused" and not used & set(route.owner.names):
                        parameter = self.parameters[route.owner.names[0]]
                        blocks[route.owner] = DenseBlock(
                            parameter.detach().new_zeros(1, 1).expand(n, parameter.numel())
                        )
                        continue
                    if route.kind == "unused" or recording.unknown & set(route.owner.names):
                        raise LayoutError("a use that no rule knows, or that the probe did not show")
                    blocks[route.owner] = extract(route.owner, recording.uses, errors, self.shapes, route.layout, n)
                except LayoutError:
                    left["single"].append(route.owner)
        for route in self.routes:
            if route.kind in left:
                left[route.kind].append(route.owner)
        for kind, owners in left.items():
            blocks |= self._fallback(kind, owners, batch, objective)
        for owner, block in blocks.items():
            if (row := block.nonfinite_row()) is not None:
                raise NonFiniteError(
                    f"the gradient of {data} row {start + row} with respect to {' and '.join(owner.names)} has NaN or "
                    "Inf: look at that example, or leave it out"
                )
        return blocks

    def _recorded(self, batch: Any, objective: Objective, start: int, data: str) -> tuple[Recording, list[Tensor]]:
        recorder = Recorder(self.parameters)
        with recorder:
            output_values = objective(self.model, batch)
        _check_finite(output_values, start, data)
        _check_rows(output_values, batch)
        recording = recorder.recording
        edges = [use.edge for use in recording.uses if use.edge is not None]
        unseen = [name for name in self.parameters if name not in recording.used]
        found: Iterator[Tensor | None] = iter(())
        if (edges or unseen) and output_values.requires_grad:
            sought: list[Any] = [*edges, *(self.parameters[name] for name in unseen)]
            found = iter(torch.autograd.grad(output_values.sum(), sought, allow_unused=True))
        errors = []
        for use in recording.uses:
            error = next(found, None) if use.edge is not None else None
            like = output_values.new_zeros(()) if error is None else error
            errors.append(like.expand(use.output_shape) if error is None else error.detach())
        # What autograd reaches and no torch function showed: a custom autograd function, an extension's kernel.
        recording.unknown |= {name for name, gradient in zip(unseen, found, strict=False) if gradient is not None}
        return recording, errors

    def _fallback(
        self, kind: str, owners: Sequence[Owner], batch: Any, objective: Objective
    ) -> dict[Owner, GradientBlock]:
        if not owners:
            return {}
        names = [name for owner in owners for name in owner.names]
        make = vectorised_gradients if kind == "vmap" else single_gradients
        rows = make(self.model, objective, names, batch)
        return {owner: DenseBlock(torch.cat([rows[name] for name in owner.names], dim=1)) for owner in owners}

    def _choose(self, batch: Any) -> tuple[Route, ...]:
        """The cheapest route for each parameter that gives the gradients of single examples."""
        self._check_deterministic(batch)
        n = rows_of(batch)
        recording, errors = self._recorded(batch, self.loss, 0, "train")
        self._check_independent(batch)
        reference = single_gradients(self.model, self.loss, list(self.parameters), batch)
        whole = torch.cat(list(reference.values()), dim=1).double().norm(dim=1)
        used = recording.used
        routes, rest = [], []
        for owner in self._owners(recording):
            expected = torch.cat([reference[name] for name in owner.names], dim=1)
            if not used & set(owner.names):
                routes.append(Route(owner, "unused"))
                continue
            layout = None
            if not recording.unknown & set(owner.names):
                layout = self._layout(owner, recording, errors, n, expected, whole)
            if layout is None:
                rest += [Owner(name, None) for name in owner.names]
            else:
                outer = owner.weight is not None and is_outer(recording.uses, owner.weight)
                routes.append(Route(owner, "outer" if outer else "rows", layout))
        return tuple(self._in_order(routes + self._rest(rest, batch, reference, whole)))

    def _owners(self, recording: Recording) -> list[Owner]:
        """A layer's weight and bias as one where they are always used together and lie in one group."""
        group = {name: key for key, names in self.groups.items() for name in names}
        owners, joined = [], set()
        for name in self.parameters:
            uses = [use for use in recording.uses if use.weight is not None and use.weight.name == name]
            if not uses or not is_outer(recording.uses, name) or any(u.kind not in ("linear", "conv") for u in uses):
                continue
            biases = {use.bias.name if use.bias is not None else None for use in uses}
            bias = biases.pop()
            elsewhere = [u for u in recording.uses if u.bias is not None and u.bias.name == bias and u not in uses]
            if bias is None or biases or elsewhere or group[bias] != group[name] or bias in recording.unknown:
                continue
            owners.append(Owner(name, bias))
            joined |= {name, bias}
        weights = {use.weight.name for use in recording.uses if use.weight is not None}
        shared = weights & {use.bias.name for use in recording.uses if use.bias is not None}
        recording.unknown |= shared
        alone = [name for name in self.parameters if name not in joined]
        return owners + [Owner(name, None) if name in weights else Owner(None, name) for name in alone]

    def _layout(
        self, owner: Owner, recording: Recording, errors: list[Tensor], n: int, expected: Tensor, whole: Tensor
    ) -> str | None:
        """The layout that gives the expected rows, None where none does.

        Where the probe's gradients are zero but for rounding they tell nothing: then the only layout that has the right
        shape, None where there are several.
        """
        possible = {}
        for layout in LAYOUTS:
            try:
                rows = extract(owner, recording.uses, errors, self.shapes, layout, n).dense()
            except (LayoutError, RuntimeError):
                continue
            if rows.shape == expected.shape:
                possible[layout] = rows
        if bool((expected.double().norm(dim=1) <= _noise(expected.dtype) * whole).all()):
            return next(iter(possible)) if len(possible) == 1 else None
        return next((layout for layout, rows in possible.items() if _agree(rows, expected, whole)), None)

    def _rest(self, owners: list[Owner], batch: Any, reference: Mapping[str, Tensor], whole: Tensor) -> list[Route]:
        if not owners:
            return []
        names = [owner.names[0] for owner in owners]
        try:
            rows = vectorised_gradients(self.model, self.loss, names, batch)
        except Exception:  # whatever an unforeseen model raises under vmap, single passes still work
            return [Route(owner, "single") for owner in owners]
        return [
            Route(owner, "vmap" if _agree(rows[owner.names[0]], reference[owner.names[0]], whole) else "single")
            for owner in owners
        ]

    def _in_order(self, routes: list[Route]) -> list[Route]:
        order = {name: i for i, name in enumerate(self.parameters)}
        return sorted(routes, key=lambda route: order[route.owner.names[0]])

    def _check_independent(self, batch: Any) -> None:
        together = self.loss(self.model, batch).detach()
        for i in range(rows_of(batch)):
            alone = self.loss(self.model, slice_rows(batch, i, i + 1)).detach()[0]
            if not torch.isclose(together[i], alone, rtol=_tolerance(alone.dtype), atol=_tolerance(alone.dtype)):
                raise TaskError(
                    f"the loss of train row {i} is {alone.item():.6g} alone but {together[i].item():.6g} in a batch: "
                    "the model or the loss mixes the examples of a batch (batch statistics, a mean over the batch, a "
                    "contrastive term). Influence needs one loss per example"
                )

    def _check_deterministic(self, batch: Any) -> None:
        outputs: list[list[tuple[str, Tensor]]] = []
        for _ in range(2):
            seen: list[tuple[str, Tensor]] = []
            outputs.append(seen)
            hooks = [
                module.register_forward_hook(
                    lambda _m, _i, out, name=name, seen=seen: (
                        seen.append((name, out.detach().clone())) if isinstance(out, Tensor) else None
                    )
                )
                for name, module in self.model.named_modules()
            ]
            try:
                with torch.no_grad():
                    seen.append(("the loss", self.loss(self.model, batch)))
            finally:
                for hook in hooks:
                    hook.remove()
        for (name, first), (_, second) in zip(*outputs, strict=False):
            same = first.shape == second.shape and torch.allclose(
                first.double() if first.is_floating_point() else first,
                second.double() if second.is_floating_point() else second,
                rtol=_tolerance(first.dtype),
                atol=_tolerance(first.dtype),
                equal_nan=True,
            )
            if not same:
                kind = dict(self.model.named_modules()).get(name)
                what = f"module {name or 'model'!r} ({type(kind).__name__})" if kind is not None else name
                raise NonDeterministicError(
                    f"{what} gave two different outputs for the same input in eval mode: remove the randomness "
                    "(functional dropout without training=self.training, sampled noise), or seed it by the input"
                )


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 5e-2)


def _noise(dtype: torch.dtype) -> float:
    """Rounding of a parameter's gradient, relative to that of all parameters together."""
    return 8 * torch.finfo(dtype).eps


def _agree(rows: Tensor, expected: Tensor, whole: Float[Tensor, " n"]) -> bool:
    """Whether rows of a parameter's gradients are the expected ones; `whole` are the norms over all parameters."""
    allowed = _tolerance(expected.dtype) * expected.double().norm(dim=1) + _noise(expected.dtype) * whole
    return bool(((rows.double() - expected.double()).norm(dim=1) <= allowed).all())


def _check_finite(values: Tensor, start: int, data: str) -> None:
    if not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values)).nonzero()[0])
        raise NonFiniteError(
            f"the loss of {data} row {start + row} is {values[row].item()}: look at that example's input and target, "
            "or leave it out"
        )


def _check_rows(values: Tensor, batch: Any) -> None:
    if values.shape[0] != rows_of(batch):
        raise TaskError(
            f"the loss gave {values.shape[0]} values for a batch of {rows_of(batch)} examples: an example is a row of "
            "the data set; average over an example's own tokens or outputs"
        )
