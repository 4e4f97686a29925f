"""Choosing training rows: by leverage, by volume, by coverage, by difficulty, at random."""

from refluence.selection.choosing import METHODS, select
from refluence.selection.coverage import k_center
from refluence.selection.determinant import d_optimal, pivoted_qr
from refluence.selection.difficulty import el2n, grand
from refluence.selection.herding import herding
from refluence.selection.result import Selection
from refluence.selection.sampling import distinct_sampling, sampling

__all__ = [
    "METHODS",
    "Selection",
    "d_optimal",
    "distinct_sampling",
    "el2n",
    "grand",
    "herding",
    "k_center",
    "pivoted_qr",
    "sampling",
    "select",
]
