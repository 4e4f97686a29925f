"""Leverage and ridge-leverage scores of any matrix, and what follows from them."""

from refluence.leverage.compute import leverage_scores
from refluence.leverage.matrix import FeatureMatrix
from refluence.leverage.network import BlockLeverage, block_leverage
from refluence.leverage.regression import cooks_distance, dffits, studentized_residuals
from refluence.leverage.scores import LeverageScores, RankGap

__all__ = [
    "BlockLeverage",
    "FeatureMatrix",
    "LeverageScores",
    "RankGap",
    "block_leverage",
    "cooks_distance",
    "dffits",
    "leverage_scores",
    "studentized_residuals",
]
