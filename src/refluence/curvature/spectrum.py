"""The spectrum of a curvature, exact or estimated."""

from __future__ import annotations

import numpy as np
import torch

from refluence.curvature.base import Curvature
from refluence.curvature.outer import OuterCurvature
from refluence.gradients.kernels import gram_matrices
from refluence.linalg import spectral_quadrature
from refluence.theory import SpectralMeasure

EXACT_SIZE = 2048
EXACT_ROWS = 8192
PROBES = 12
STEPS = 64
SEED = 0


def spectrum_of(curvature: Curvature, block: str) -> SpectralMeasure:
    """Eigenvalues where a d×d matrix or the Gram matrix of the rows is small, else nodes and weights of a quadrature.

    The quadrature's error in d_λ is some √(2/(probes·d_λ)) of it: 2 % at d_λ = 300 with 12 probes.
    """
    d = curvature.dimensions[block]
    few_rows = isinstance(curvature, OuterCurvature) and curvature.n * curvature.q <= EXACT_ROWS
    if d <= EXACT_SIZE:
        return SpectralMeasure(torch.linalg.eigvalsh(curvature._dense(block)).cpu().numpy())
    if few_rows:
        assert isinstance(curvature, OuterCurvature)
        gram = gram_matrices(curvature.features, (block,))[block] / curvature.n
        if (weights := curvature.row_weights) is not None:
            gram *= weights.sqrt()[:, None] * weights.sqrt()
        return SpectralMeasure(np.maximum(torch.linalg.eigvalsh(gram).cpu().numpy(), 0.0))
    nodes, weights = spectral_quadrature(
        curvature.operator(block), d, PROBES, STEPS, SEED, curvature.dtype, curvature.device
    )
    values = nodes.double().flatten().cpu().numpy()
    if curvature.positive:
        values = np.maximum(values, 0.0)
    return SpectralMeasure(values, weights.double().flatten().cpu().numpy())
