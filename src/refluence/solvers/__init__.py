"""Ways of applying (C + λI)⁻¹: frozen configurations whose `prepare(curvature)` gives a state that scores."""

from refluence.solvers import preconditioners
from refluence.solvers.arnoldi import Arnoldi
from refluence.solvers.base import Solver
from refluence.solvers.conjugate_gradient import ConjugateGradient
from refluence.solvers.dense import Dense
from refluence.solvers.gram import Gram
from refluence.solvers.harmonic_mean import HarmonicMean
from refluence.solvers.identity import Identity
from refluence.solvers.kfac import Ekfac, Kfac
from refluence.solvers.lissa import Lissa
from refluence.solvers.nystroem import Nystroem
from refluence.solvers.sketched import Sketched
from refluence.solvers.state import Solution, State

__all__ = [
    "Arnoldi",
    "ConjugateGradient",
    "Dense",
    "Ekfac",
    "Gram",
    "HarmonicMean",
    "Identity",
    "Kfac",
    "Lissa",
    "Nystroem",
    "Sketched",
    "Solution",
    "Solver",
    "State",
    "preconditioners",
]
