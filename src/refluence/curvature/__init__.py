"""Curvatures: the matrices C whose damped inverse weighs gradients against each other."""

from refluence.curvature.base import Curvature, Vectors
from refluence.curvature.functional import FunctionalCurvature
from refluence.curvature.outer import OuterCurvature

__all__ = ["Curvature", "FunctionalCurvature", "OuterCurvature", "Vectors"]
