"""Arithmetic and memory traffic that a route cannot do without, to set next to what it took."""

from __future__ import annotations

from dataclasses import dataclass

LAYERS = ((784 + 1, 128), (128 + 1, 64), (64 + 1, 10))
PARAMETERS = sum(inputs * outputs for inputs, outputs in LAYERS)


@dataclass(frozen=True)
class Work:
    """Counted work of one step: GFLOP in a precision."""

    step: str
    formula: str
    gflop: float
    dtype: str


def gram_route(n: int, k: int) -> list[Work]:
    """The steps of the exact route; a multiplication and an addition are two operations."""
    widths = sum(inputs + outputs for inputs, outputs in LAYERS)
    return [
        Work(
            "Gram of the train gradients, by symmetry half", "n² Σ(d_in + 1 + d_out)", n * n * widths / 1e9, "float64"
        ),
        Work("Gram of test and train gradients", "2 n k Σ(d_in + 1 + d_out)", 2 * n * k * widths / 1e9, "float64"),
        Work("Cholesky", "n³ / 3", n**3 / 3 / 1e9, "float64"),
        Work("two triangular solves", "2 n² k", 2 * n * n * k / 1e9, "float64"),
    ]


def formed_bytes(n: int, m: int) -> int:
    """What a sketch of formed float32 gradients moves at least: reads n × d, writes n × m."""
    return 4 * n * (PARAMETERS + m)


def copy_bytes(n: int) -> int:
    """What a copy of the gradients moves: reads and writes n × d float32."""
    return 2 * 4 * n * PARAMETERS
