"""Theory: pure functions of spectra."""

from refluence.theory.sketching import corrected_damping, implied_damping
from refluence.theory.spectrum import SpectralMeasure, damping_for, effective_dimension, numerical_rank

__all__ = [
    "SpectralMeasure",
    "corrected_damping",
    "damping_for",
    "effective_dimension",
    "implied_damping",
    "numerical_rank",
]
