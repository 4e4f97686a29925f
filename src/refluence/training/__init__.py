"""Seeded training of one model, or of many together."""

from refluence.training.recipe import Recipe, stream

__all__ = ["Recipe", "stream"]
