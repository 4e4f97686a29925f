"""Theory: pure functions of spectra, of Gram matrices and of sketched ones."""

from refluence.theory.barrier import injective, lost_dimensions
from refluence.theory.bounds import (
    RangeNorms,
    distortion,
    distortion_factor,
    error_bound,
    gap,
    least_size,
    pair_bounds,
    range_error,
    range_norms,
)
from refluence.theory.estimation import (
    DimensionEstimate,
    StochasticSpectrum,
    stochastic_effective_dimension,
    stochastic_spectrum,
    subsampled_effective_dimension,
)
from refluence.theory.factorised import (
    factor_dampings,
    factor_dimensions,
    kronecker_dimension,
    kronecker_distortion,
)
from refluence.theory.leakage import (
    factorised_leakage,
    kernel_norms,
    leakage_bound,
    leakage_deviation,
    pair_leakage_bound,
)
from refluence.theory.sizing import achieved_epsilon, sketch_size
from refluence.theory.sketching import (
    corrected_damping,
    implied_damping,
    sketch_variance_scale,
    sketched_dimension,
)
from refluence.theory.spectrum import (
    SpectralMeasure,
    damping_for,
    effective_dimension,
    numerical_rank,
    stable_rank,
)

__all__ = [
    "DimensionEstimate",
    "RangeNorms",
    "SpectralMeasure",
    "StochasticSpectrum",
    "achieved_epsilon",
    "corrected_damping",
    "damping_for",
    "distortion",
    "distortion_factor",
    "effective_dimension",
    "error_bound",
    "factor_dampings",
    "factor_dimensions",
    "factorised_leakage",
    "gap",
    "implied_damping",
    "injective",
    "kernel_norms",
    "kronecker_dimension",
    "kronecker_distortion",
    "leakage_bound",
    "leakage_deviation",
    "least_size",
    "lost_dimensions",
    "numerical_rank",
    "pair_bounds",
    "pair_leakage_bound",
    "range_error",
    "range_norms",
    "sketch_size",
    "sketch_variance_scale",
    "sketched_dimension",
    "stable_rank",
    "stochastic_effective_dimension",
    "stochastic_spectrum",
    "subsampled_effective_dimension",
]
