"""What a sketch keeps in memory between batches."""

from __future__ import annotations

from refluence.sketches.base import Sketch
from refluence.sketches.dense import CACHE_BYTES as TILES_BYTES
from refluence.sketches.dense import DenseSketch
from refluence.sketches.kronecker import CACHE_BYTES as FACTORS_BYTES
from refluence.sketches.kronecker import Kronecker
from refluence.sketches.rademacher import Rademacher
from refluence.sketches.sjlt import CACHE_BYTES as HASHES_BYTES
from refluence.sketches.sjlt import SJLT

HASH_BYTES = 28
"""A column's row and sign twice, as hashed and as sorted."""


def sketch_cache_bytes(sketch: Sketch, d: int) -> float:
    """Bytes that a sketch of gradients of length d keeps of P for the next batch."""
    if isinstance(sketch, SJLT):
        return float(min(HASHES_BYTES, HASH_BYTES * sketch.nonzeros * d))
    if isinstance(sketch, DenseSketch):
        return float(min(TILES_BYTES, sketch.m * d * (1 if isinstance(sketch, Rademacher) else 4)))
    if isinstance(sketch, Kronecker):
        # A layer's factors have no more columns than it has parameters.
        return float(min(FACTORS_BYTES, 8 * max(sketch.m_a, sketch.m_e) * d))
    return 0.0
