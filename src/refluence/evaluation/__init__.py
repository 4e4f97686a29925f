"""Attribution against reality: retraining, agreement with it, and what data cleaning gains from the scores."""

from refluence.evaluation.agreement import agreement, loo_agreement
from refluence.evaluation.baselines import (
    baseline_scores,
    embedding_neighbours,
    gradient_cosine,
    gradient_dot,
    loss_scores,
    random_scores,
)
from refluence.evaluation.comparison import evaluate
from refluence.evaluation.convex import leave_one_out, minimise
from refluence.evaluation.estimate import Estimate
from refluence.evaluation.ground_truth import GroundTruth
from refluence.evaluation.lds import lds, lds_difference
from refluence.evaluation.measuring import measure
from refluence.evaluation.mislabel import Detection, mislabel
from refluence.evaluation.newton import Removals, newton_removal, newton_steps
from refluence.evaluation.plots import (
    plot_agreement,
    plot_brittleness,
    plot_comparison,
    plot_detection,
    plot_removal,
    plot_spectrum,
)
from refluence.evaluation.randomisation import randomisation
from refluence.evaluation.rankings import (
    corrected_overlap,
    kendall_tau,
    overlap_by_chance,
    overlaps,
    rank_biased_overlap,
    spearman_rho,
    swap_fraction,
)
from refluence.evaluation.refitting import Refit, refit_without
from refluence.evaluation.removal import Brittleness, brittleness, removal_curve
from refluence.evaluation.retraining import load_models, retrain
from refluence.evaluation.retrieval import class_retrieval, subclass_retrieval, top_cardinality
from refluence.evaluation.subsets import leave_out, random_subsets
from refluence.evaluation.tail_patch import tail_patch
from refluence.evaluation.tuning import Tuning, tune_damping
from refluence.evaluation.verification import Verification, verify
from refluence.training import Recipe

__all__ = [
    "Brittleness",
    "Detection",
    "Estimate",
    "GroundTruth",
    "Recipe",
    "Refit",
    "Removals",
    "Tuning",
    "Verification",
    "agreement",
    "baseline_scores",
    "brittleness",
    "class_retrieval",
    "corrected_overlap",
    "embedding_neighbours",
    "evaluate",
    "gradient_cosine",
    "gradient_dot",
    "kendall_tau",
    "lds",
    "lds_difference",
    "leave_one_out",
    "leave_out",
    "load_models",
    "loo_agreement",
    "loss_scores",
    "measure",
    "minimise",
    "mislabel",
    "newton_removal",
    "newton_steps",
    "overlap_by_chance",
    "overlaps",
    "plot_agreement",
    "plot_brittleness",
    "plot_comparison",
    "plot_detection",
    "plot_removal",
    "plot_spectrum",
    "random_scores",
    "random_subsets",
    "randomisation",
    "rank_biased_overlap",
    "refit_without",
    "removal_curve",
    "retrain",
    "spearman_rho",
    "subclass_retrieval",
    "swap_fraction",
    "tail_patch",
    "top_cardinality",
    "tune_damping",
    "verify",
]
