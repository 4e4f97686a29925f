"""What a call of a torch function says of the parameters that it uses: a rule for each known function."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """What a rule reads from a call: the parameters by role, the input, and the options that shape the gradient."""

    kind: str
    weight: Any
    bias: Any
    inputs: Any
    options: Mapping[str, Any] = field(default_factory=dict)


def _bind(names: str, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names.split(), args, strict=False)), **kwargs}


def _linear(args: tuple, kwargs: Mapping[str, Any]) -> Call | None:
    given = _bind("input weight bias", args, kwargs)
    return Call("linear", given["weight"], given.get("bias"), given["input"])


def _addmm(args: tuple, kwargs: Mapping[str, Any]) -> Call | None:
    given = _bind("input mat1 mat2", args, kwargs)
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1:
        return None
    return Call("matmul", given["mat2"], given["input"], given["mat1"])


def _matmul(args: tuple, kwargs: Mapping[str, Any]) -> Call | None:
    given = _bind("input other", args, kwargs)
    other = given.get("other")
    if not isinstance(other, Tensor) or other.ndim != 2:
        return None
    return Call("matmul", other, None, given["input"])


def _conv(args: tuple, kwargs: Mapping[str, Any]) -> Call | None:
    given = _bind("input weight bias stride padding dilation groups", args, kwargs)
    dims = given["weight"].ndim - 2
    if given["input"].ndim != dims + 2:
        return None

    def each(value: Any) -> tuple[int, ...]:
        return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)

    kernel = tuple(given["weight"].shape[2:])
    dilation, padding = each(given.get("dilation", 1)), given.get("padding", 0)
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(total // 2, total - total // 2) for total in totals]
    else:
        pads = [(p, p) for p in each(padding)]
    options = {
        "kernel": kernel,
        "stride": each(given.get("stride", 1)),
        "dilation": dilation,
        "padding": tuple(p for pair in reversed(pads) for p in pair),
        "groups": given.get("groups", 1),
    }
    return Call("conv", given["weight"], given.get("bias"), given["input"], options)


def _embedding(args: tuple, kwargs: Mapping[str, Any]) -> Call | None:
    given = _bind("input weight padding_idx max_norm norm_type scale_grad_by_freq sparse", args, kwargs)
    if given.get("max_norm") is not None or given.get("scale_grad_by_freq"):
        return None
    padding = given.get("padding_idx")
    if padding is not None and padding < 0:
        padding += given["weight"].shape[0]
    return Call(
        "embedding", given["weight"], None, given["input"], {"padding": padding, "dtype": given["weight"].dtype}
    )


def _layer_norm(args: tuple, kwargs: Mapping[str, Any]) -> Call | None:
    given = _bind("input normalized_shape weight bias eps", args, kwargs)
    x, shape = given["input"], tuple(given["normalized_shape"])
    normalised = F.layer_norm(x.detach(), shape, None, None, given.get("eps", 1e-5))
    return Call("trailing", given.get("weight"), given.get("bias"), normalised)


def _rms_norm(args: tuple, kwargs: Mapping[str, Any]) -> Call | None:
    given = _bind("input normalized_shape weight eps", args, kwargs)
    normalised = F.rms_norm(given["input"].detach(), list(given["normalized_shape"]), None, given.get("eps"))
    return Call("trailing", given.get("weight"), None, normalised)


def _group_norm(args: tuple, kwargs: Mapping[str, Any]) -> Call | None:
    given = _bind("input num_groups weight bias eps", args, kwargs)
    normalised = F.group_norm(given["input"].detach(), given["num_groups"], None, None, given.get("eps", 1e-5))
    return Call("channel", given.get("weight"), given.get("bias"), normalised)


def _batch_norm(args: tuple, kwargs: Mapping[str, Any]) -> Call | None:
    given = _bind("input running_mean running_var weight bias training momentum eps", args, kwargs)
    mean, var = given.get("running_mean"), given.get("running_var")
    if given.get("training") or mean is None or var is None:
        return None
    normalised = F.batch_norm(given["input"].detach(), mean, var, None, None, False, 0.0, given.get("eps", 1e-5))
    return Call("channel", given.get("weight"), given.get("bias"), normalised)


def _multiply(args: tuple, kwargs: Mapping[str, Any]) -> Call | None:
    given = _bind("input other", args, kwargs)
    first, second = given.get("input"), given.get("other")
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return None
    weight, other = (first, second) if isinstance(first, torch.nn.Parameter) else (second, first)
    return None if isinstance(other, torch.nn.Parameter) else Call("trailing", weight, None, other.detach())


def _add(args: tuple, kwargs: Mapping[str, Any]) -> Call | None:
    given = _bind("input other", args, kwargs)
    first, second = given.get("input"), given.get("other")
    if kwargs.get("alpha", 1) != 1 or not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return None
    bias, other = (first, second) if isinstance(first, torch.nn.Parameter) else (second, first)
    return None if isinstance(other, torch.nn.Parameter) else Call("trailing", None, bias, other.detach())


RULES: dict[Any, Callable[[tuple, Mapping[str, Any]], Call | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.conv1d: _conv,
    torch.conv2d: _conv,
    torch.conv3d: _conv,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    torch.mul: _multiply,
    Tensor.mul: _multiply,
    Tensor.__mul__: _multiply,
    Tensor.__rmul__: _multiply,
    torch.add: _add,
    Tensor.add: _add,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
}


def _transparent(function: Callable) -> Callable:
    """A copy of a Python-level torch function that runs its body instead of handing itself to the recorder again.

    Attention is such a function: its projections are then seen as the linear maps that they are.
    """
    code = inspect.unwrap(function)
    scope = {**code.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(code.__code__, scope, code.__name__, code.__defaults__, code.__closure__)
    copy.__kwdefaults__ = code.__kwdefaults__
    return copy


TRANSPARENT: dict[Any, Callable] = {F.multi_head_attention_forward: _transparent(F.multi_head_attention_forward)}


REORDERING = {
    torch.index_select,
    Tensor.index_select,
    torch.gather,
    Tensor.gather,
    torch.masked_select,
    Tensor.masked_select,
    torch._VF._pack_padded_sequence,
}
"""Calls after which rows may be others than those of the batch, in its order."""
