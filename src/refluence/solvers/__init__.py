"""Ways of applying (C + λI)⁻¹: frozen configurations whose `prepare(curvature)` gives a state that scores."""

from refluence.solvers.base import Solver
from refluence.solvers.conjugate_gradient import ConjugateGradient
from refluence.solvers.dense import Dense
from refluence.solvers.gram import Gram
from refluence.solvers.identity import Identity
from refluence.solvers.sketched import Sketched
from refluence.solvers.state import Solution, State

__all__ = ["ConjugateGradient", "Dense", "Gram", "Identity", "Sketched", "Solution", "Solver", "State"]
