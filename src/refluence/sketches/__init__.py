"""Random projections P (m×d) with E[PᵀP] = I."""

from refluence.sketches.base import Sketch
from refluence.sketches.gaussian import Gaussian
from refluence.sketches.kronecker import Kronecker
from refluence.sketches.rademacher import Rademacher
from refluence.sketches.sjlt import SJLT
from refluence.sketches.tensor import TensorSketch

__all__ = ["SJLT", "Gaussian", "Kronecker", "Rademacher", "Sketch", "TensorSketch"]
