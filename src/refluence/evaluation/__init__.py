"""Attribution against reality: retraining, agreement with it, and what data cleaning gains from the scores."""

from refluence.evaluation.estimate import Estimate
from refluence.evaluation.ground_truth import GroundTruth

__all__ = ["Estimate", "GroundTruth"]
