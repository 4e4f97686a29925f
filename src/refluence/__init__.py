"""Refluence: which training examples made the model do that, and can you trust the answer?"""

from refluence import errors, sketches, solvers, theory
from refluence._version import __version__
from refluence.damping import EffectiveDimension, RelativeDamping
from refluence.execution import Execution
from refluence.influence import Influence
from refluence.scores import Scores
from refluence.task import Task

__all__ = [
    "EffectiveDimension",
    "Execution",
    "Influence",
    "RelativeDamping",
    "Scores",
    "Task",
    "__version__",
    "errors",
    "sketches",
    "solvers",
    "theory",
]
