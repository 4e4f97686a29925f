"""Random numbers of each model's own, so that a model does not depend on those it is trained with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from refluence.training.recipe import stream

_aten = torch.ops.aten


class Draws:
    """The stream of one model's dropout masks: 32 bits an entry of PCG64, drawn on the CPU for every device."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(stream(seed, "dropout"))

    def kept(self, count: int, share: float) -> np.ndarray:
        """`count` booleans, each True with probability `share`."""
        bits = self._bits.random_raw((count + 1) // 2).view(np.uint32)[:count]
        return bits < np.uint64(round(share * 2**32))

    @property
    def state(self) -> dict[str, Any]:
        """Where the stream is, JSON-able."""
        return dict(self._bits.state)

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self._bits.state = cast(Any, dict(state))


def bernoulli(draws: Sequence[Draws], like: Tensor, share: float) -> Tensor:
    """Zeros and ones in the shape, dtype and device of `like` (m, ...), each model's from its own stream."""
    size = like.numel() // max(1, len(draws))
    kept = np.empty((len(draws), size), dtype=np.bool_)
    for one, row in zip(draws, kept, strict=True):
        row[:] = one.kept(size, share)
    return torch.from_numpy(kept).view(like.shape).to(device=like.device, dtype=like.dtype)


def native_dropout(
    draws: Sequence[Draws], values: Tensor, share: float, training: bool | None
) -> tuple[Tensor, Tensor]:
    """What `aten.native_dropout` gives: values with a share dropped, scaled to keep the mean, and the mask."""
    if training is False or share == 0:
        return values.clone(), torch.ones_like(values, dtype=torch.bool)
    kept = bernoulli(draws, values, 1 - share)
    scale = 0.0 if share == 1 else 1 / (1 - share)
    return values * kept * scale, kept.bool()


# The random operations that dropout of every kind comes down to, given the streams first.
DRAWN: dict[Any, Callable[..., Any]] = {
    _aten.bernoulli.p: lambda draws, like, share, generator=None: bernoulli(draws, like, share),
    _aten.bernoulli_.float: lambda draws, out, share=0.5, generator=None: out.copy_(bernoulli(draws, out, share)),
    _aten.native_dropout.default: native_dropout,
}


class _OwnDraws(TorchDispatchMode):
    """Dropout from a model's own stream; everything else as it is."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self._draws = draws
        self.used = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in DRAWN:
            return func(*args, **(kwargs or {}))
        self.used = True
        # One model: its tensors have no dimension of models.
        return DRAWN[func]([self._draws], *args, **(kwargs or {}))


class OwnDropout:
    """Runs the forward passes of one model with its own dropout masks; passes that draw none cost nothing."""

    def __init__(self, draws: Draws) -> None:
        self._draws = draws
        self._needed: bool | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around a forward pass."""
        if self._needed is False:
            yield
            return
        with _OwnDraws(self._draws) as mode:
            yield
        self._needed = mode.used
