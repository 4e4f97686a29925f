"""Curvatures: what C is."""

from refluence.curvature.fisher import EmpiricalFisher

__all__ = ["EmpiricalFisher"]
