"""From recorded uses and their output gradients to gradient blocks.

An output's leading dimensions hold the examples and their positions in one of a few layouts; which one is found
by trial against single-example gradients (`capture.py`), never assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from refluence.gradients.blocks import DenseBlock, GradientBlock
from refluence.gradients.factors import Dense, Factor, OneHot, Patches, Term
from refluence.gradients.fan import FanBlock
from refluence.gradients.outer import OuterBlock, merged
from refluence.gradients.recorder import Slice, Use

LAYOUTS = ("first", "second", "batch-major", "batch-minor")
MATRIX_KINDS = ("linear", "matmul", "conv", "embedding")


class LayoutError(ValueError):
    """A tensor whose shape does not fit the layout."""


def arrange(values: Tensor, layout: str, n: int, leading: int) -> Shaped[Tensor, "n t ..."]:
    """Bring (leading dimensions..., rest...) to (n examples, t positions, rest...)."""
    lead, rest = values.shape[:leading], values.shape[leading:]
    if layout == "first" and leading >= 1 and lead[0] == n:
        return values.reshape(n, lead[1:].numel(), *rest)
    if layout == "second" and leading >= 2 and lead[1] == n:
        return values.movedim(1, 0).reshape(n, lead[:1].numel() * lead[2:].numel(), *rest)
    if layout.startswith("batch-") and leading >= 1 and lead[0] > n and lead[0] % n == 0:
        k = lead[0] // n
        if layout == "batch-major":
            return values.reshape(n, k * lead[1:].numel(), *rest)
        return values.reshape(k, n, *lead[1:], *rest).movedim(1, 0).reshape(n, k * lead[1:].numel(), *rest)
    raise LayoutError(f"{tuple(values.shape)} is not in layout {layout!r} of {n} examples")


def _padded(values: Float[Tensor, "n t k"], piece: Slice) -> Float[Tensor, "n t r"]:
    """Gradients of a stretch of rows, with zeros for the parameter's other rows."""
    if piece.whole:
        return values
    return torch.nn.functional.pad(values, (piece.start, piece.rows - piece.stop))


def _kept(values: Tensor) -> Tensor:
    """The values without the rest of a larger tensor that they are a view of, which would stay in memory with them."""
    return values.clone() if values.untyped_storage().nbytes() > 2 * values.nbytes else values


def _leading(use: Use) -> int:
    """How many leading dimensions of the output are examples and positions."""
    if use.kind in ("conv", "channel"):
        return 1
    return len(use.output_shape) - 1


@dataclass
class Inputs:
    """What uses of weight matrices were fed, as factors that the gradients of all columns of an objective share."""

    layout: str
    n: int
    made: dict[int, Factor] = field(default_factory=dict)

    def of(self, use: Use) -> Factor:
        """The factor of a use's input."""
        if id(use) not in self.made:
            self.made[id(use)] = self._factor(use)
        return self.made[id(use)]

    def _factor(self, use: Use) -> Factor:
        assert use.weight is not None
        if use.kind == "conv":
            images, options = _kept(arrange(use.inputs, self.layout, self.n, 1)), use.options
            return Patches(images, options["kernel"], options["stride"], options["dilation"], options["padding"])
        values = _kept(arrange(use.inputs, self.layout, self.n, _leading(use)))
        if use.kind == "embedding":
            return OneHot(values + use.weight.start, use.weight.rows, use.options["dtype"])
        return Dense(_padded(values, use.weight) if use.kind == "matmul" else values)


def _term(use: Use, error: Tensor, inputs: Inputs) -> Term:
    """The outer products of one use of a weight matrix; `error` is the gradient of its output."""
    assert use.weight is not None
    fed = inputs.of(use)
    if use.kind == "conv":
        return Term(Dense(_conv_error(error, inputs.layout, inputs.n)), fed)
    e = _kept(arrange(error, inputs.layout, inputs.n, _leading(use)))
    if use.kind == "embedding":
        if (padding := use.options["padding"]) is not None:
            assert isinstance(fed, OneHot)
            e = e * (fed.index != padding + use.weight.start)[..., None]
        return Term(fed, Dense(e))
    if use.kind == "matmul":
        return Term(fed, Dense(e))
    return Term(Dense(_padded(e, use.weight)), fed)


def _conv_error(error: Tensor, layout: str, n: int) -> Float[Tensor, "n t c"]:
    e = arrange(error if error.ndim > 2 else error[..., None], layout, n, 1)
    return e.flatten(3).transpose(2, 3).reshape(n, -1, error.shape[1])


def _grouped_conv(use: Use, error: Tensor, layout: str, n: int) -> Float[Tensor, "n d"]:
    """A grouped convolution's gradients as rows: with few parameters a position, rows are smaller than factors."""
    groups = use.options["groups"]
    images = arrange(use.inputs, layout, n, 1)
    parts = images.unflatten(2, (groups, -1)).unbind(2)
    errors = _conv_error(error, layout, n).unflatten(2, (groups, -1)).unbind(2)
    options = use.options
    rows = []
    for part, e in zip(parts, errors, strict=True):
        patches = Patches(part, options["kernel"], options["stride"], options["dilation"], options["padding"])
        rows.append(torch.bmm(e.transpose(1, 2), patches.vectors()).flatten(1))
    return torch.cat(rows, dim=1)


def _scale(use: Use, error: Tensor, shape: Sequence[int], layout: str, n: int) -> Float[Tensor, "n d"]:
    """Σ_t error ∘ input, for a parameter that multiplies elementwise, along channels or trailing dimensions."""
    inputs = use.inputs.expand_as(error) if use.inputs.ndim <= error.ndim else use.inputs
    return _shift(use, error * inputs, shape, layout, n)


def _shift(use: Use, error: Tensor, shape: Sequence[int], layout: str, n: int) -> Float[Tensor, "n d"]:
    """Σ_t error, for a parameter of `shape` that is added, along channels or trailing dimensions."""
    if use.kind in ("conv", "channel"):
        return _conv_error(error, layout, n).sum(dim=1)
    if use.kind in MATRIX_KINDS:
        return arrange(error, layout, n, _leading(use)).sum(dim=1)
    aligned = [1] * (error.ndim - len(shape)) + list(shape)
    summed = [dim for dim, size in enumerate(aligned) if size == 1 and dim > 1]
    if summed:
        error = error.sum(dim=summed, keepdim=True)
    return _broadcast_sum(error, aligned, layout, n)


def _broadcast_sum(error: Tensor, aligned: Sequence[int], layout: str, n: int) -> Float[Tensor, "n d"]:
    """Per-example sums over the first two dimensions where the parameter has size one."""
    if layout == "second":
        error, aligned = error.transpose(0, 1), [aligned[1], aligned[0], *aligned[2:]]
    elif layout != "first":
        if aligned[0] != 1:
            raise LayoutError("the parameter varies over the flattened examples")
        return arrange(error, layout, n, 1).sum(dim=1).flatten(1)
    if error.shape[0] != n or aligned[0] != 1:
        raise LayoutError("the first dimension is not that of the examples")
    if len(aligned) > 1 and aligned[1] == 1 and error.ndim > 1:
        error = error.sum(dim=1, keepdim=True)
    return error.reshape(n, -1)


@dataclass(frozen=True)
class Owner:
    """Which parameters one block holds: a weight, its bias, or both as one."""

    weight: str | None
    bias: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in the order of the block's columns."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)


def is_outer(uses: Sequence[Use], weight: str) -> bool:
    """Whether the gradient of `weight` is a sum of outer products that is worth keeping as factors."""
    mine = [use for use in uses if use.weight is not None and use.weight.name == weight]
    return bool(mine) and all(use.kind in MATRIX_KINDS and use.options.get("groups", 1) == 1 for use in mine)


def extract(
    owner: Owner,
    uses: Sequence[Use],
    columns: Sequence[Sequence[Tensor]],
    shapes: dict[str, torch.Size],
    layout: str,
    n: int,
) -> GradientBlock:
    """The gradients of `owner`'s parameters, those of several columns of the objective one after the other.

    Raises:
        LayoutError: the shapes do not fit the layout.
    """
    inputs = Inputs(layout, n)
    parts = [extract_one(owner, uses, errors, shapes, inputs) for errors in columns]
    if len(parts) == 1:
        block = parts[0]
        return block if _worth_factors(block) else DenseBlock(block.dense())
    fan = FanBlock(tuple(parts))
    return fan if _worth_factors(fan) else FanBlock(tuple(DenseBlock(part.dense()) for part in parts))


def extract_one(
    owner: Owner, uses: Sequence[Use], errors: Sequence[Tensor], shapes: dict[str, torch.Size], inputs: Inputs
) -> GradientBlock:
    """The gradients of `owner`'s parameters for one column of the objective, with the inputs' factors shared.

    Raises:
        LayoutError: the shapes do not fit the layout.
    """
    layout, n = inputs.layout, inputs.n
    pairs = list(zip(uses, errors, strict=True))
    if owner.weight is None:
        assert owner.bias is not None
        return DenseBlock(_sum_of_shifts(owner.bias, pairs, shapes, layout, n))
    mine = [(use, error) for use, error in pairs if use.weight is not None and use.weight.name == owner.weight]
    if not mine:
        raise LayoutError(f"no gradient reached {owner.weight}")
    if not is_outer(uses, owner.weight):
        rows = None
        for use, error in mine:
            assert use.weight is not None
            if use.kind in MATRIX_KINDS and use.kind != "conv":
                part = OuterBlock((_term(use, error, inputs),)).dense()
            elif use.kind == "conv":
                part = _grouped_conv(use, error, layout, n)
            else:
                part = _scale(use, error, shapes[owner.weight], layout, n)
            rows = part if rows is None else rows + part
        assert rows is not None
        return DenseBlock(rows)
    return OuterBlock(merged([_term(use, error, inputs) for use, error in mine]), owner.bias is not None)


def _worth_factors(block: GradientBlock) -> bool:
    """Whether what is kept takes less memory than the rows that it makes."""
    return isinstance(block, DenseBlock) or sum(tensor.numel() for tensor in block.tensors()) < block.n * block.d


def _sum_of_shifts(
    bias: str, pairs: Sequence[tuple[Use, Tensor]], shapes: dict[str, torch.Size], layout: str, n: int
) -> Float[Tensor, "n d"]:
    total: Tensor | None = None
    for use, error in pairs:
        if use.bias is None or use.bias.name != bias:
            continue
        part = _shift(use, error, shapes[bias], layout, n)
        if not use.bias.whole:
            part = torch.nn.functional.pad(part, (use.bias.start, use.bias.rows - use.bias.stop))
        total = part if total is None else total + part
    if total is None:
        raise LayoutError(f"no gradient reached {bias}")
    return total
