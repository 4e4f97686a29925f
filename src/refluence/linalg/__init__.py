"""Algorithms on a symmetric linear map `apply: (d, k) → (d, k)`, whatever it is the map of."""

from refluence.linalg.block_cg import block_conjugate_gradient
from refluence.linalg.columns import ColumnSolution
from refluence.linalg.conjugate_gradient import conjugate_gradient
from refluence.linalg.diagonal import hutchinson_diagonal
from refluence.linalg.lanczos import Ends, RitzPairs, ends_steps, lanczos, ritz_pairs, ritz_steps, spectral_bounds
from refluence.linalg.lockstep import run_together
from refluence.linalg.maps import Apply
from refluence.linalg.neumann import neumann_depth, neumann_solve
from refluence.linalg.nystroem import nystroem_approximation, nystroem_steps
from refluence.linalg.quadrature import spectral_quadrature

__all__ = [
    "Apply",
    "ColumnSolution",
    "Ends",
    "RitzPairs",
    "block_conjugate_gradient",
    "conjugate_gradient",
    "ends_steps",
    "hutchinson_diagonal",
    "lanczos",
    "neumann_depth",
    "neumann_solve",
    "nystroem_approximation",
    "nystroem_steps",
    "ritz_pairs",
    "ritz_steps",
    "run_together",
    "spectral_bounds",
    "spectral_quadrature",
]
