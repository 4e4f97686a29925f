"""The sizes of a job that is planned before there is a model or data, and the devices that it could run on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from refluence.errors import PlanError
from refluence.gradients.blocks import accumulation_dtype
from refluence.sketches import SJLT, Sketch

ASPECT = 128
"""Width of a transformer over its depth, as of GPT-3 175B, 12,288 and 96."""
TOKEN_BYTES = 8
"""A token is read as an int64."""
UTILISATION = 0.4


@dataclass(frozen=True)
class Device:
    """What a device can do, at the most.

    Args:
        name: for people.
        rate: FLOP/s of matrix products in the gradients' dtype.
        double_rate: FLOP/s of matrix products in float64.
        memory: bytes; None: not limited.
        bandwidth: bytes/s of its memory; None: not limited.

    Raises:
        PlanError: a number that is not positive.
    """

    name: str
    rate: float
    double_rate: float
    memory: float | None = None
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        for name in ("rate", "double_rate", "memory", "bandwidth"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise PlanError(f"{name} of device {self.name!r} must be positive and finite, not {value!r}")


DEVICES = {
    "h100": Device("H100 SXM", 989e12, 67e12, 80e9, 3.35e12),
    "h200": Device("H200", 989e12, 67e12, 141e9, 4.8e12),
    "a100": Device("A100 80GB", 312e12, 19.5e12, 80e9, 2.04e12),
}
"""As their data sheets say, for dense bfloat16 and for float64 on tensor cores."""


@dataclass(frozen=True)
class Layer:
    """`count` equal weight matrices.

    Args:
        rows, columns: of a matrix.
        count: how many; a fraction where the number of parameters asks for it.
        positions: at which an example uses a matrix; None: as many as an example of the job has.
        bias: whether each has a vector of its rows.
        lookup: an embedding, of which a position takes a row, without a product.

    Raises:
        PlanError: a size that is not positive.
    """

    rows: int
    columns: int
    count: float = 1
    positions: int | None = None
    bias: bool = False
    lookup: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "count", "positions"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise PlanError(f"{name} of a Layer must be positive, not {value!r}")

    @property
    def d(self) -> float:
        """Parameters of one of them."""
        return float(self.rows * (self.columns + self.bias))

    @property
    def passed(self) -> float:
        """Multiply-adds of a position."""
        return 0.0 if self.lookup else float(self.rows * self.columns)

    @property
    def factors(self) -> float:
        """Numbers of a position's factors: of a lookup an index and an error."""
        return 1.0 + self.columns if self.lookup else float(self.rows + self.columns)

    @property
    def kept(self) -> bool:
        """Whether its factors are kept of a gradient, which are then fewer numbers than its rows."""
        return (self.positions or 1) * self.factors < self.d


def transformer_layers(d: int) -> tuple[Layer, ...]:
    """The matrices of a transformer with d parameters: d/(12w²) blocks of width w, w over their number being 128.

    A block has four w×w matrices of its attention, and w×4w and 4w×w: 12w² parameters.
    """
    width = max(1, round((d * ASPECT / 12) ** (1 / 3)))
    depth = d / (12 * width**2)
    return (
        Layer(width, width, 4 * depth),
        Layer(4 * width, width, depth),
        Layer(width, 4 * width, depth),
    )


@dataclass(frozen=True)
class Scale:
    """The sizes of a job with solver Sketched.

    Args:
        n, tests: train and test examples.
        d: parameters, taken as those of `transformer_layers`; None: those of `layers`.
        layers: the weight matrices, that of the input first; None: from d.
        positions: at which an example uses each matrix: tokens of a sequence.
        attention: widths in which all positions attend to each other, summed over the model's blocks; None: those of
            `transformer_layers`, and 0 for layers that are given.
        sketch: P, with m rows for each block.
        blocks: "full": one curvature of all parameters; "module": one of each matrix.
        dtype: of model and gradients.
        store_dtype: of the stored rows; None: that in which they are summed, at least float32.
        batch_size: examples of a forward pass; None: as `fit` chooses.
        shard_rows: rows of a shard of the store; None: about 16 MB, as the store chooses.
        example_bytes: of an example as it is read; None: 8 for each position.
        errors: whether the scores get standard errors, where the sketch has them.
        workers: processes with rows of their own.
        device: what a worker has, one or as many as its memory needs: a `Device`, or "h100", "h200" or "a100".
        utilisation: the share of the device's rates that is reached.

    Raises:
        PlanError: a size out of range, neither or both of d and layers, an unknown device.
    """

    n: int
    d: int | None = None
    layers: tuple[Layer, ...] | None = None
    positions: int = 1
    attention: int | None = None
    tests: int = 500
    sketch: Sketch = field(default_factory=lambda: SJLT(4096))
    blocks: str = "full"
    dtype: torch.dtype = torch.bfloat16
    store_dtype: torch.dtype | None = None
    batch_size: int | None = None
    shard_rows: int | None = None
    example_bytes: int | None = None
    errors: bool = True
    workers: int = 1
    device: Device | str = "h100"
    utilisation: float = UTILISATION

    def __post_init__(self) -> None:
        if self.attention is not None and self.attention < 0:
            raise PlanError(f"attention of a Scale must be at least 0, not {self.attention!r}")
        for name in ("n", "d", "positions", "tests", "batch_size", "shard_rows", "example_bytes", "workers"):
            value = getattr(self, name)
            if value is None and name in ("d", "batch_size", "shard_rows", "example_bytes"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(f"{name} of a Scale must be an integer of at least 1, not {value!r}")
        if (self.d is None) == (not self.layers):
            raise PlanError("a Scale needs the number of parameters, d=..., or its layers=(Layer(...), ...), not both")
        if not isinstance(self.sketch, Sketch):
            raise PlanError(f"sketch of a Scale must be one such as rf.sketches.SJLT(4096), not {self.sketch!r}")
        if self.blocks not in ("full", "module"):
            raise PlanError(f'blocks of a Scale must be "full" or "module", not {self.blocks!r}')
        if not self.dtype.is_floating_point:
            raise PlanError(f"dtype of a Scale must be a floating-point one, not {self.dtype}")
        if not 0 < self.utilisation <= 1:
            raise PlanError(f"utilisation of a Scale must be above 0 and at most 1, not {self.utilisation!r}")
        if not isinstance(self.device, Device) and self.device not in DEVICES:
            raise PlanError(
                f"unknown device {self.device!r}: use {', '.join(DEVICES)}, or "
                "refluence.scale.Device(name, rate, double_rate, memory, bandwidth)"
            )

    @property
    def matrices(self) -> tuple[Layer, ...]:
        """The layers, each with its positions."""
        layers = self.layers or transformer_layers(int(self.d or 0))
        return tuple(replace(one, positions=one.positions or self.positions) for one in layers)

    @property
    def attended(self) -> float:
        """Widths of the attention, summed over the blocks."""
        if self.attention is not None:
            return float(self.attention)
        # The second kind of matrix of the assumed layers is in each block once.
        return 0.0 if self.layers is not None else self.matrices[1].count * self.matrices[1].columns

    @property
    def parameters(self) -> float:
        """How many there are."""
        return float(self.d) if self.d is not None else sum(one.count * one.d for one in self.matrices)

    @property
    def block_count(self) -> int:
        """Curvature blocks."""
        return 1 if self.blocks == "full" else max(1, round(sum(one.count for one in self.matrices)))

    @property
    def side(self) -> int:
        """Of a block's matrix: m, or n where that is smaller."""
        return min(self.sketch.m, self.n)

    @property
    def summed_dtype(self) -> torch.dtype:
        """In which projected rows are summed."""
        return accumulation_dtype(self.dtype)

    @property
    def on(self) -> Device:
        """The device."""
        return self.device if isinstance(self.device, Device) else DEVICES[self.device]
