"""Leverage in many bases: which rows it finds, whether seeds change it, and what training on them gives."""

from refluence.studies.leverage_basis.options import DEFAULTS, Options
from refluence.studies.leverage_basis.study import run

__all__ = ["DEFAULTS", "Options", "run"]
