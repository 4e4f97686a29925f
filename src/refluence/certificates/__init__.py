"""Certificates: what the approximation of τ cost, proved or measured."""

from refluence.certificates.certificate import Certificate
from refluence.certificates.certify import certify

__all__ = ["Certificate", "certify"]
