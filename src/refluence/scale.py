"""Arithmetic, memory, bytes and hours of a sketched fit of any size, from its sizes alone.

No model and no data are needed, so that 10⁹ examples of 70·10⁹ parameters can be planned. Every number is counted from
stated assumptions (`ScalePlan.assumptions`). FLOPs are two for a multiply-add.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from refluence.fitting import FACTOR_BYTES_PER_BATCH, LARGEST_BATCH
from refluence.gradients.capture import CHECKED_TWICE, ROWS_PER_CHECK
from refluence.planning import IN_FLIGHT
from refluence.scale_sizes import DEVICES, Device, Layer, Scale, transformer_layers
from refluence.scale_sketching import (
    by_factors,
    kept_numbers,
    making_seconds,
    moved_bytes,
    numbers_made,
    projection_work,
)
from refluence.scale_words import assumptions, lines
from refluence.sketches.memory import sketch_cache_bytes
from refluence.solvers.cost import EIGENVALUES_WORK
from refluence.solvers.sketch_errors import has_error_formula
from refluence.store.checksums import CHECKSUM_BYTES
from refluence.store.keeping import SHARD_BYTES

__all__ = ["DEVICES", "Device", "Layer", "Scale", "ScalePlan", "Stage", "StorePlan", "scale_plan", "transformer_layers"]

SMALLEST_BATCH = 8
SUMMED_ROWS, SUMMED_COLUMNS = 4096, 256
"""P C Pᵀ is added up of so many rows at a time, of which so many columns are multiplied by those before them."""
SHARD_OVERHEAD = 1400
ARRAY_OVERHEAD = 830
"""Bytes of a shard, and of each of its arrays, that are no numbers: names, attributes, zip entries; to 10 %."""
EXPONENT_BYTES = 2
PACKED_COPIES = 3
"""A shard, its zarr arrays and the zip file are in memory at once."""


@dataclass(frozen=True)
class Stage:
    """A part of the work.

    Attributes:
        name: of the part.
        flops: over all examples; 0 where something else takes the time.
        seconds: on one device.
        shared: whether the workers share it; else one device does it alone.
    """

    name: str
    flops: float
    seconds: float
    shared: bool = True


@dataclass(frozen=True)
class StorePlan:
    """The files of a store.

    Attributes:
        shards: how many, of `rows` rows each but the last.
        numbers: bytes of the projected rows, with their exponents.
        checksums: bytes of the rows' checksums.
        overhead: bytes of names, attributes and zip entries.
    """

    shards: int
    rows: int
    numbers: int
    checksums: int
    overhead: int

    @property
    def size(self) -> int:
        """All bytes."""
        return self.numbers + self.checksums + self.overhead


@dataclass(frozen=True)
class ScalePlan:
    """What a job of some size takes.

    Attributes:
        scale: the sizes.
        batch_size: examples of a forward pass.
        stages: the work.
        store: its files.
        memory: what a worker holds at once → bytes.
        held: bytes of a worker's projected rows, which lie in a mapped file with `Execution(offload="disk")` and in
            memory without.
        traffic: what is moved → bytes.
        assumptions: what the numbers stand on, in words.
    """

    scale: Scale
    batch_size: int
    stages: tuple[Stage, ...]
    store: StorePlan
    memory: dict[str, float]
    held: float
    traffic: dict[str, float]
    assumptions: tuple[str, ...]

    @property
    def flops(self) -> float:
        """Of all stages."""
        return sum(stage.flops for stage in self.stages)

    @property
    def device_seconds(self) -> float:
        """Of one device that does everything."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def device_hours(self) -> float:
        """Hours of one device that does everything."""
        return self.device_seconds / 3600

    @property
    def peak_memory(self) -> float:
        """Bytes that a worker holds at once, without its projected rows."""
        return sum(self.memory.values())

    @property
    def devices_per_worker(self) -> int:
        """As many as a worker's memory needs."""
        return _devices(self.scale, self.memory)

    @property
    def wall_seconds(self) -> float:
        """Until the worker with the most rows is done, and the factorisation after it."""
        shared = sum(stage.seconds for stage in self.stages if stage.shared)
        alone = self.device_seconds - shared
        most = min(self.scale.n, math.ceil(self.store.shards / self.scale.workers) * self.store.rows)
        return shared * most / self.scale.n / self.devices_per_worker + alone

    @property
    def wall_hours(self) -> float:
        """The same in hours."""
        return self.wall_seconds / 3600

    def summary(self) -> str:
        """Several lines for people."""
        return "\n".join(lines(self))

    def __str__(self) -> str:
        return self.summary()


def scale_plan(scale: Scale) -> ScalePlan:
    """Count what a fit by solver Sketched with a store, and one score call, take.

    Forward 2p, backward 2p and, where they are formed, gradients 2p FLOPs an example with p = Σ positions·R·C over the
    matrices: 6·d·tokens where every matrix is used at every token. The projection is the sketch's own `work`, PCPᵀ is
    n·m² FLOPs and its factorisation m³, a score m multiply-adds.
    """
    batch_size = scale.batch_size or _batch_size(scale)
    store = _store(scale, batch_size)
    memory = _memory(scale, batch_size, store)
    made = numbers_made(scale, batch_size, min(scale.workers, store.shards))
    making = making_seconds(scale, made, _devices(scale, memory))
    stages = _stages(scale, batch_size, making)
    held = math.ceil(store.shards / scale.workers) * store.rows
    width = scale.sketch.m * scale.block_count * scale.summed_dtype.itemsize
    return ScalePlan(
        scale,
        batch_size,
        stages,
        store,
        memory,
        float(min(scale.n, held) * width),
        _traffic(scale, store),
        tuple(assumptions(scale, batch_size, checked_share(batch_size), IN_FLIGHT)),
    )


def _devices(scale: Scale, memory: dict[str, float]) -> int:
    room = scale.on.memory
    return 1 if room is None else max(1, math.ceil(sum(memory.values()) / room))


def checked_share(batch_size: int) -> float:
    """The share of examples whose gradients are made a second time, singly, and compared (`gradients.capture`)."""
    count = 2 if batch_size >= CHECKED_TWICE else 1
    return count / max(batch_size, ROWS_PER_CHECK)


def _batch_size(scale: Scale) -> int:
    fitting = int(FACTOR_BYTES_PER_BATCH / max(1.0, kept_numbers(scale) * scale.dtype.itemsize))
    return max(SMALLEST_BATCH, min(LARGEST_BATCH, 1 << max(0, fitting.bit_length() - 1)))


def _stages(scale: Scale, batch_size: int, making: float) -> tuple[Stage, ...]:
    n, m, side, blocks, k = scale.n, scale.sketch.m, scale.side, scale.block_count, scale.tests
    rate, double = (scale.utilisation * r for r in (scale.on.rate, scale.on.double_rate))
    examples = n + k
    passed = [one.count * (one.positions or 1) * one.passed for one in scale.matrices]
    # Of an input that is data no error is needed; below a transformer's matrices there is its embedding.
    backward = sum(passed) - (passed[0] if scale.layers else 0.0)
    formed = sum(p for p, one in zip(passed, scale.matrices, strict=True) if not by_factors(scale, one))
    moved = examples * moved_bytes(scale)
    projection = 2.0 * examples * projection_work(scale)
    curvature = float(n * m * (m + min(SUMMED_COLUMNS, m))) if m <= n else 2.0 * n * n * m
    # Two products forward and four backward, of every pair of positions.
    attention = 12.0 * scale.positions**2 * scale.attended if scale.positions > 1 else 0.0
    share = checked_share(batch_size)
    compared = sum(p for p, one in zip(passed, scale.matrices, strict=True) if (one.positions or 1) > 1 and one.kept)
    single = share * 2.0 * (2 * sum(passed) + backward + compared)
    stages = [
        _stage("forward", 2.0 * examples * sum(passed), rate),
        _stage("backward", 2.0 * examples * backward, rate),
        _stage("attention", (1 + share) * examples * attention, rate),
        _stage("checks", examples * single, rate),
        _stage("gradients", 2.0 * examples * formed, rate),
        Stage("projection", projection, max(projection / rate, moved / (scale.on.bandwidth or math.inf))),
        Stage("P itself", 0.0, making),
        _stage("curvature", blocks * curvature, double),
        _stage("factorisation", blocks * 2.0 * (1 + EIGENVALUES_WORK) * side**3 / 3, double, shared=False),
        _stage("scores", blocks * 2.0 * (n * m * k + side**2 * k), double),
    ]
    if scale.errors and has_error_formula(scale.sketch):
        # Beside the n×n matrix the tests are multiplied by the rows twice; beside the m×m one the rows are solved for.
        errors = n * m * side + n * m * k if m <= n else 2 * n * m * k + n**3
        stages.append(_stage("errors", blocks * 2.0 * errors, double))
    return tuple(stages)


def _stage(name: str, flops: float, rate: float, shared: bool = True) -> Stage:
    return Stage(name, flops, flops / rate, shared)


def _store(scale: Scale, batch_size: int) -> StorePlan:
    """The shards as `store.keeping` chooses them."""
    stored, blocks = scale.store_dtype or scale.summed_dtype, scale.block_count
    width = scale.sketch.m * blocks * stored.itemsize
    wanted = scale.shard_rows or max(1, SHARD_BYTES // width)
    batches = -(-wanted // batch_size) if scale.shard_rows else max(1, wanted // batch_size)
    rows = batches * batch_size
    shards = -(-scale.n // rows)
    exponents = EXPONENT_BYTES * blocks if stored == torch.float16 else 0
    arrays = blocks * (2 if exponents else 1)
    return StorePlan(
        shards,
        rows,
        scale.n * (width + exponents),
        scale.n * CHECKSUM_BYTES,
        shards * (SHARD_OVERHEAD + arrays * ARRAY_OVERHEAD),
    )


def _memory(scale: Scale, batch_size: int, store: StorePlan) -> dict[str, float]:
    m, side, blocks = scale.sketch.m, scale.side, scale.block_count
    row = m * blocks * scale.summed_dtype.itemsize
    return {
        "model": scale.parameters * scale.dtype.itemsize,
        "batch in flight": IN_FLIGHT * batch_size * kept_numbers(scale) * scale.dtype.itemsize + batch_size * row,
        "a gradient that is checked": scale.parameters * scale.dtype.itemsize,
        "P kept for the next batch": sketch_cache_bytes(scale.sketch, int(scale.parameters)),
        "m × m matrices": 16.0 * side**2 * blocks + 8.0 * side**2,
        "rows added to them at a time": 8.0 * min(scale.n, SUMMED_ROWS) * m,
        "a shard while it is packed": float(PACKED_COPIES * min(scale.n, store.rows) * row),
    }


def _traffic(scale: Scale, store: StorePlan) -> dict[str, float]:
    m, side, blocks = scale.sketch.m, scale.side, scale.block_count
    example = scale.example_bytes or 8 * scale.positions
    return {
        "data read, twice": 2.0 * scale.n * example,
        "store written": float(store.size),
        "curvatures, from every worker": 8.0 * scale.workers * side**2 * blocks,
        "solved tests, to every worker": 8.0 * scale.workers * scale.tests * m * blocks,
        "scores": 8.0 * scale.n * scale.tests * (2 if scale.errors and has_error_formula(scale.sketch) else 1),
    }
