"""What the projection of one example takes, and P itself, in a job of any size."""

from __future__ import annotations

import math

from refluence.scale_sizes import Layer, Scale
from refluence.sketches import SJLT, Kronecker
from refluence.sketches.base import ColumnSketch
from refluence.sketches.factored import FactoredSketch
from refluence.sketches.kronecker import CACHE_BYTES as FACTORS_BYTES
from refluence.sketches.memory import sketch_cache_bytes

PASSED = 3
"""A formed gradient is written, read and added."""
HASHED_BYTES = 320
"""Memory that hashing a column moves: some twenty passes over int64."""
HASHED, DRAWN, ORTHOGONAL = 6.4e7, 2.8e8, 2.2e7
"""Columns that a core hashes in a second, numbers of a dense P that it draws, and numbers of orthogonal factors."""


def kept_numbers(scale: Scale) -> float:
    """Numbers that are kept of an example's gradient: the factors of each matrix, or its rows where they are fewer."""
    return sum(one.count * min((one.positions or 1) * one.factors, one.d) for one in scale.matrices)


def by_factors(scale: Scale, one: Layer) -> bool:
    """Whether the sketch takes the factors of a matrix, so that its gradient is never formed."""
    return isinstance(scale.sketch, FactoredSketch) and one.kept


def projection_work(scale: Scale) -> float:
    """Multiply-adds of one example, by `Sketch.work`: of each position's factors, or of formed gradients."""
    if not isinstance(scale.sketch, FactoredSketch):
        return scale.sketch.work(int(scale.parameters), scale.parameters)
    total = 0.0
    for one in scale.matrices:
        d = int(one.d)
        if by_factors(scale, one):
            total += one.count * (one.positions or 1) * scale.sketch.work(d, one.factors)
        else:
            total += one.count * scale.sketch.work(d, float(d))
    return total


def moved_bytes(scale: Scale) -> float:
    """Memory traffic of one example's formed gradient."""
    if isinstance(scale.sketch, FactoredSketch):
        return 0.0
    return PASSED * scale.parameters * scale.summed_dtype.itemsize


def numbers_made(scale: Scale, batch_size: int, workers: int) -> float:
    """Numbers of P that the workers make: each once where they are kept for the next batch, else for every batch."""
    sketch, examples = scale.sketch, scale.n + scale.tests
    if isinstance(sketch, Kronecker):
        numbers = sum(
            one.count * (sketch.m_e * one.rows + sketch.m_a * (one.columns + one.bias)) for one in scale.matrices
        )
        again = numbers if numbers * scale.summed_dtype.itemsize > FACTORS_BYTES else 0.0
        rows = batch_size
    elif isinstance(sketch, ColumnSketch):
        d = scale.parameters
        numbers = d * (sketch.nonzeros if isinstance(sketch, SJLT) else sketch.m)
        whole, kept = d * sketch_cache_bytes(sketch, 1), sketch_cache_bytes(sketch, int(d))
        # The oldest columns make room for new ones, so that a pass in order finds none; tiles of a dense P stay.
        lost = 1.0 if isinstance(sketch, SJLT) else 1 - kept / whole
        again = lost * numbers if whole > kept else 0.0
        rows = min(batch_size, sketch.chunk_rows)
    else:  # hashes of the factors alone
        return 0.0
    return numbers * workers + again * max(0, math.ceil(examples / rows) - workers)


def making_seconds(scale: Scale, numbers: float, devices: int) -> float:
    """Seconds of one device for so many numbers of P, those that wait for a core of the host counted.

    Args:
        numbers: of P.
        devices: of a worker.
    """
    if isinstance(scale.sketch, SJLT):
        bandwidth = scale.on.bandwidth
        return numbers / HASHED if bandwidth is None else numbers * HASHED_BYTES / bandwidth
    return devices * numbers / (ORTHOGONAL if isinstance(scale.sketch, Kronecker) else DRAWN)
