"""Random bits as a pure function of (seed, index): the same on every device, in every order, for every chunk."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64, whose own shift keeps the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def mix(values: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """SplitMix64's finaliser: 64 well-mixed bits of every integer (Steele, Lea & Flood, 2014)."""
    values = values + _GOLDEN
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def random_bits(seed: int, stream: int, start: int, count: int, device: torch.device) -> Int64[Tensor, " count"]:
    """64 random bits for each index in [start, start + count) of one stream of a seed."""
    key = int(mix(mix(torch.tensor(_signed(seed))) + stream))
    return mix(torch.arange(start, start + count, device=device, dtype=torch.int64) ^ key)


def non_negative(bits: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The low 62 bits, as a non-negative integer."""
    return bits & ((1 << 62) - 1)
