"""Recording how a forward pass uses the attributed parameters.

The recorder sees calls of torch functions, not modules, so a weight is found wherever it is used: in a layer of torch,
in a user's own module, in attention, at several places. A use that no rule knows marks the parameter as `unknown`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from refluence.gradients.rules import REORDERING, RULES, TRANSPARENT


@dataclass(frozen=True, eq=False)
class Slice:
    """A parameter, or a stretch of its rows."""

    name: str
    start: int
    stop: int
    rows: int

    @property
    def whole(self) -> bool:
        """Whether it is all of the parameter."""
        return self.start == 0 and self.stop == self.rows


@dataclass(frozen=True, eq=False)
class Use:
    """One call: which parameters it used, with what, and where its output's gradient is found."""

    kind: str
    weight: Slice | None
    bias: Slice | None
    inputs: Tensor
    options: Mapping[str, Any]
    edge: GradientEdge | None
    output_shape: torch.Size


@dataclass(eq=False)
class Recording:
    """The uses of a forward pass, in order, and the parameters used in ways that no rule knows."""

    uses: list[Use] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    undifferentiated: set[str] = field(default_factory=set)
    reorders: bool = False

    @property
    def used(self) -> set[str]:
        """The parameters with a use, known or not."""
        return {piece.name for use in self.uses for piece in (use.weight, use.bias) if piece is not None} | self.unknown


class Recorder(TorchFunctionMode):
    """While active, records the uses of the given parameters (name → parameter) in `recording`."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        super().__init__()
        self.recording = Recording()
        self._slices = {
            id(parameter): Slice(name, 0, *(2 * [parameter.shape[0] if parameter.ndim else 1]))
            for name, parameter in parameters.items()
        }
        self._parameters = dict(parameters)
        self._kept: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Run `func`, and record it where it uses an attributed parameter."""
        kwargs = kwargs or {}
        if func in TRANSPARENT:
            with self:
                return TRANSPARENT[func](*args, **kwargs)
        result = func(*args, **kwargs)
        if _reorders(func, args, kwargs):
            self.recording.reorders = True
        used = {id(t): self._slices[id(t)] for t in _tensors(args, kwargs.values()) if id(t) in self._slices}
        if used:
            self._record(func, args, kwargs, result, used)
        return result

    def _record(
        self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any, used: Mapping[int, Slice]
    ) -> None:
        outputs = list(_tensors((result,), ()))
        if not any(output.requires_grad for output in outputs):
            if outputs and not torch.is_grad_enabled():
                self.recording.undifferentiated |= {piece.name for piece in used.values()}
            return
        if self._aliases(outputs, used):
            return
        call = RULES[func](args, kwargs) if func in RULES else None
        if call is None or not isinstance(result, Tensor):
            self.recording.unknown |= {piece.name for piece in used.values()}
            return
        weight, bias = self._slices.get(id(call.weight)), self._slices.get(id(call.bias))
        known = {piece.name for piece in (weight, bias) if piece is not None}
        self.recording.unknown |= {piece.name for piece in used.values()} - known
        self.recording.uses.append(
            Use(
                call.kind,
                weight,
                bias,
                call.inputs.detach(),
                call.options,
                get_gradient_edge(result) if result.requires_grad else None,
                result.shape,
            )
        )

    def _aliases(self, outputs: list[Tensor], used: Mapping[int, Slice]) -> bool:
        """Take note of views that are stretches of a parameter's rows; whether the outputs are all such views."""
        found: dict[int, Slice] = {}
        for output in outputs:
            name = next((p.name for p in used.values() if output._base is self._parameters[p.name]), None)
            if name is None:
                return False
            parameter = self._parameters[name]
            same_rows = output.ndim == parameter.ndim and output.shape[1:] == parameter.shape[1:]
            if not same_rows or output.stride() != parameter.stride():
                return False
            start = output.storage_offset() // max(1, parameter.stride(0))
            found[id(output)] = Slice(name, start, start + output.shape[0], parameter.shape[0])
        self._slices |= found
        self._kept += outputs
        return True


def _tensors(*groups: Iterable[Any]) -> Iterator[Tensor]:
    for group in groups:
        for item in group:
            if isinstance(item, Tensor):
                yield item
            elif isinstance(item, (tuple, list)):
                yield from _tensors(item)
            elif isinstance(item, dict):
                yield from _tensors(item.values())


def _reorders(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call may give other rows than those of the batch, in its order."""
    if func in (torch.gather, Tensor.gather):
        # Along the last dimension of several, as a loss picks the output of a label, every row stays where it is.
        given, dim = args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["dim"]
        return given.ndim < 2 or dim % given.ndim != given.ndim - 1
    return func in REORDERING or (func is Tensor.__getitem__ and any(True for _ in _tensors(args[1:])))
