"""Ways of applying (C + λI)⁻¹: frozen configurations whose `prepare(curvature)` gives a state that scores."""

from refluence.solvers.dense import Dense
from refluence.solvers.gram import Gram
from refluence.solvers.identity import Identity
from refluence.solvers.sketched import Sketched
from refluence.solvers.state import State

Solver = Gram | Dense | Sketched | Identity

__all__ = ["Dense", "Gram", "Identity", "Sketched", "Solver", "State"]
