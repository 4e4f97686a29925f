"""How each parameter's gradient is made, decided on a few probe rows against gradients of single examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refluence.batches import rows_of
from refluence.errors import TaskError
from refluence.gradients.agreement import agree, noise
from refluence.gradients.checks import check_deterministic, check_independent
from refluence.gradients.extraction import LAYOUTS, LayoutError, Owner, extract, is_outer
from refluence.gradients.functional import Objective, single_gradients, vectorised_gradients
from refluence.gradients.recorder import Recording
from refluence.gradients.recording import record

Groups = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Route:
    """How the gradients of one owner's parameters are made."""

    owner: Owner
    kind: str
    layout: str = "first"


@dataclass(frozen=True, eq=False)
class Router:
    """Chooses the routes for a model's parameters in their groups."""

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    groups: Groups
    loss: Objective

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Name → shape."""
        return {name: parameter.shape for name, parameter in self.parameters.items()}

    def choose(self, batch: Any) -> tuple[Route, ...]:
        """The cheapest route for each parameter that gives the gradients of single examples."""
        check_deterministic(self.model, self.loss, batch)
        n = rows_of(batch)
        recording, [errors] = record(self.model, self.parameters, self.loss, batch, 0, "train")
        check_independent(self.model, self.loss, batch, "train", "loss")
        self._check_differentiated(recording, batch)
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
                rows = extract(owner, recording.uses, [errors], self.shapes, layout, n).dense()
            except (LayoutError, RuntimeError):
                continue
            if rows.shape == expected.shape:
                possible[layout] = rows
        if bool((expected.double().norm(dim=1) <= noise(expected.dtype) * whole).all()):
            return next(iter(possible)) if len(possible) == 1 else None
        fitting = [layout for layout, rows in possible.items() if agree(rows, expected, whole)]
        # Several fit where the probe's rows cannot tell them apart, as a single row cannot tell the two flattened ones.
        return fitting[0] if len(fitting) == 1 or "first" in fitting else None

    def _check_differentiated(self, recording: Recording, batch: Any) -> None:
        """Refuse parameters that only a backward pass of their own reaches, as reentrant checkpointing makes them."""
        hidden = recording.undifferentiated - recording.used
        if not hidden:
            return
        saved = {name: parameter.grad for name, parameter in self.parameters.items()}
        try:
            for parameter in self.parameters.values():
                parameter.grad = None
            values = self.loss(self.model, batch)
            if values.requires_grad:
                values.sum().backward()
            reached = [name for name in sorted(hidden) if self.parameters[name].grad is not None]
        finally:
            for name, gradient in saved.items():
                self.parameters[name].grad = gradient
        if reached:
            raise TaskError(
                f"{', '.join(reached)} are used inside reentrant checkpointing, whose gradients only .backward() sees: "
                "use torch.utils.checkpoint with use_reentrant=False, or turn checkpointing off for the attribution"
            )

    def _rest(self, owners: list[Owner], batch: Any, reference: Mapping[str, Tensor], whole: Tensor) -> list[Route]:
        if not owners:
            return []
        names = [owner.names[0] for owner in owners]
        try:
            rows = vectorised_gradients(self.model, self.loss, names, batch)
        except Exception:  # whatever an unforeseen model raises under vmap, single passes still work
            return [Route(owner, "single") for owner in owners]
        return [
            Route(owner, "vmap" if agree(rows[owner.names[0]], reference[owner.names[0]], whole) else "single")
            for owner in owners
        ]

    def _in_order(self, routes: list[Route]) -> list[Route]:
        order = {name: i for i, name in enumerate(self.parameters)}
        return sorted(routes, key=lambda route: order[route.owner.names[0]])
