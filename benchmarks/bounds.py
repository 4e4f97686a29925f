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


WIDTHS = sum(inputs + outputs for inputs, outputs in LAYERS)
CLASSES = LAYERS[-1][1]
BLOCK_RECURRENCE = 8  # products of k × k with k × d in a step of block conjugate gradients


def score_product(n: int, k: int) -> float:
    """GFLOP of n × k inner products of d numbers, what scores cost where nothing of the structure is used."""
    return 2 * n * k * PARAMETERS / 1e9


def curvature_product(n: int, columns: float, rows: int) -> float:
    """GFLOP of (1/n) Σ_i Σ_q f_iq f_iqᵀ V: the layers' inputs are shared by the q rows of an example."""
    return 4 * n * columns * (PARAMETERS + (rows - 1) * WIDTHS) / 1e9


def gram_products(rows: int, others: int) -> float:
    """GFLOP of rows × others inner products of gradients that are outer products."""
    return 2 * rows * others * WIDTHS / 1e9


def conjugate_gradients(n: int, k: int, steps: float, together: int) -> float:
    """GFLOP of a GGN product for each of the steps of all columns, of the recurrences, and of the scores.

    One more product for each column measures its residual; `together` columns share a search space, 0 for none.
    """
    recurrence = BLOCK_RECURRENCE * 2 * steps * together * PARAMETERS / 1e9
    return curvature_product(n, steps + k, CLASSES) + recurrence + score_product(n, k)


def sampled_gram(n: int, k: int, samples: int) -> float:
    """GFLOP of the Gram route with N = n·samples rows, test and train gradients across, and Cholesky."""
    rows = n * samples
    own = rows * rows * WIDTHS / 1e9
    across = gram_products(rows, n + k) + gram_products(n, k)
    return own + across + (rows**3 / 3 + 2 * rows**2 * k + 2 * rows * n * k) / 1e9


def kronecker(n: int, k: int, samples: int) -> float:
    """GFLOP of covariances, rotations and eigenvalues, of the rotated gradients and their products."""
    rotation = sum(2 * inputs**2 + 2 * outputs**2 for inputs, outputs in LAYERS)
    fit = n * (2 * rotation * samples + 2 * samples * PARAMETERS)
    return (fit + (n + k) * rotation) / 1e9 + score_product(n, k)


def low_rank(n: int, k: int, products: float, rank: int, rows: int) -> float:
    """GFLOP of products with the curvature, of coordinates in its eigenvectors, and of the Gram products."""
    coordinates = 2 * (n + k) * rank * PARAMETERS + 2 * n * k * rank
    return curvature_product(n, products, rows) + coordinates / 1e9 + gram_products(n, k)


def harmonic(n: int, k: int) -> float:
    """GFLOP of the Gram matrix by halves, of test and train gradients across, and of their product."""
    return gram_products(n, n) / 2 + gram_products(n, k) + 2 * n * n * k / 1e9


def gram_route(n: int, k: int) -> list[Work]:
    """The steps of the exact route; a multiplication and an addition are two operations."""
    return [
        Work(
            "Gram of the train gradients, by symmetry half", "n² Σ(d_in + 1 + d_out)", n * n * WIDTHS / 1e9, "float64"
        ),
        Work("Gram of test and train gradients", "2 n k Σ(d_in + 1 + d_out)", 2 * n * k * WIDTHS / 1e9, "float64"),
        Work("Cholesky", "n³ / 3", n**3 / 3 / 1e9, "float64"),
        Work("two triangular solves", "2 n² k", 2 * n * n * k / 1e9, "float64"),
    ]


def formed_bytes(n: int, m: int) -> int:
    """What a sketch of formed float32 gradients moves at least: reads n × d, writes n × m."""
    return 4 * n * (PARAMETERS + m)


def copy_bytes(n: int) -> int:
    """What a copy of the gradients moves: reads and writes n × d float32."""
    return 2 * 4 * n * PARAMETERS
