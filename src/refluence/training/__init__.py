"""Seeded training of one model, or of many together."""

from refluence.training.fresh import fresh_model
from refluence.training.recipe import Recipe, stream
from refluence.training.single import train
from refluence.training.together import train_together

__all__ = ["Recipe", "fresh_model", "stream", "train", "train_together"]
