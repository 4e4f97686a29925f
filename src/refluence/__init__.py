"""Refluence: which training examples made the model do that, and can you trust the answer?"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from refluence._version import __version__

if TYPE_CHECKING:
    from refluence import errors, evaluation, leverage, selection, sketches, solvers, theory
    from refluence.accuracy import Accuracy
    from refluence.certificates import Certificate
    from refluence.damping import EffectiveDimension, RelativeDamping
    from refluence.ensemble import Ensemble
    from refluence.execution import Execution
    from refluence.influence import Influence
    from refluence.layer_features import features
    from refluence.leverage import LeverageScores, leverage_scores
    from refluence.scale import Scale, scale_plan
    from refluence.scores import Scores
    from refluence.selection import Selection, select
    from refluence.stored_scores import StoredScores
    from refluence.task import Task

__all__ = [
    "Accuracy",
    "Certificate",
    "EffectiveDimension",
    "Ensemble",
    "Execution",
    "Influence",
    "LeverageScores",
    "RelativeDamping",
    "Scale",
    "Scores",
    "Selection",
    "StoredScores",
    "Task",
    "__version__",
    "errors",
    "evaluation",
    "features",
    "leverage",
    "leverage_scores",
    "scale_plan",
    "select",
    "selection",
    "sketches",
    "solvers",
    "theory",
]

_HOMES = {
    "Accuracy": "accuracy",
    "Certificate": "certificates",
    "EffectiveDimension": "damping",
    "RelativeDamping": "damping",
    "Ensemble": "ensemble",
    "Execution": "execution",
    "Influence": "influence",
    "LeverageScores": "leverage",
    "Scale": "scale",
    "Scores": "scores",
    "Selection": "selection",
    "StoredScores": "stored_scores",
    "select": "selection",
    "Task": "task",
    "features": "layer_features",
    "leverage_scores": "leverage",
    "scale_plan": "scale",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `refluence --help` then needs no torch."""
    if name in _HOMES:
        value = getattr(import_module(f"refluence.{_HOMES[name]}"), name)
    elif name in __all__:
        value = import_module(f"refluence.{name}")
    else:
        raise AttributeError(f"module 'refluence' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
