"""Every solver on every curvature and block structure, through the public API, against dense float64 references.

Every pair (solver, curvature) has two cells, of two of the four block structures (a variant of a solver has one). The
model, one batch or uneven ones, weights of the examples, and a damping for all blocks or one each with weight decay are
drawn by rotations, so that any two of solver, curvature, blocks, model, batching, weights occur in every pairing: a
test counts them. In a cell, at three dampings, every entry of scores, self-influence and inverse-Hessian products is
compared with that of the dense inverse which the solver stands for: (C+μ)⁻¹ for the exact ones, else its own formula
made of the reference's C.
"""

import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import refluence as rf
from refluence.errors import PlanError, SolverError
from refluence.linalg.nystroem import random_orthonormal
from refluence.solvers import (
    Arnoldi,
    ConjugateGradient,
    Dense,
    Ekfac,
    Gram,
    HarmonicMean,
    Identity,
    Kfac,
    Lissa,
    Nystroem,
    Sketched,
    preconditioners,
)
from refluence.solvers.sketched import block_sketches
from support.curvatures import harmonic_inverse, kronecker_factors, low_rank_inverse, neumann_inverse
from support.problems import MODELS, SAMPLES, SEED, N, Problem, close, damped, problem

DAMPINGS = (0.1, 1e-2, 1e-3)
CURVATURES = ("fisher", "ggn", "hessian", "true_fisher", "mc_fisher")
STRUCTURES = ("full", "module", "parameter", "dict")
WHOLE = 1000
RANK = 6
DEPTH = 10


def exact(cell, block, C, shift):
    return torch.linalg.inv(damped(C, shift))


def largest_pairs(cell, block, C, shift):
    return low_rank_inverse(C, shift, RANK) if len(C) > RANK else exact(cell, block, C, shift)


def nystroem(cell, block, C, shift):
    omega = random_orthonormal(len(C), min(RANK, len(C)), 2, torch.float64, "cpu")
    low = C @ omega @ torch.linalg.pinv(omega.T @ C @ omega, rtol=1e-13, hermitian=True) @ omega.T @ C
    return exact(cell, block, low, shift)


def neumann(cell, block, C, shift):
    scale = cell.influence.diagnostics["scale"][block]
    assert scale >= float(torch.linalg.eigvalsh(C)[-1]) + shift - 1e-9
    return neumann_inverse(C, shift, scale, DEPTH)


def mean_of_inverses(cell, block, C, shift):
    reference, columns = cell.problem.reference, cell.problem.columns(cell.structure)[block]
    if cell.curvature == "fisher":
        return harmonic_inverse(reference.gradients[:, columns], reference.w, shift)
    rows = [reference.slopes(i, y) @ J[:, columns] for i, (y, J) in enumerate(reference.samples())]
    return harmonic_inverse(torch.cat(rows), reference.w.repeat_interleave(SAMPLES), shift)


def sketched(cell, block, C, shift):
    P = block_sketches(cell.solver.sketch, list(cell.problem.groups(cell.structure)))[block].matrix(len(C))
    return P.T @ exact(cell, block, P @ C @ P.T, shift) @ P


def kronecker(cell, block, C, shift):
    """Factors of the reference's own where a layer is linear and sees one position; else the state's eigenbasis, with
    K-FAC's eigenvalues as they are and those of EK-FAC as the diagonal of the reference's C in that basis."""
    matrix = torch.zeros_like(C)
    state, groups = cell.influence._fit.state, cell.problem.groups(cell.structure)
    sizes = [dict(cell.problem.model.named_parameters())[name].numel() for name in groups[block]]
    places = dict(zip(groups[block], torch.arange(len(C)).split(sizes), strict=True))
    for layer, basis in zip(state.layers, state.bases, strict=True):
        if layer.group != block:
            continue
        index = torch.cat([places[name] for name in layer.owner.names])
        own = C[index][:, index]
        if basis.kind == "kronecker":
            Q = basis.unrotate(torch.eye(len(own)).double().reshape(len(own), *basis.values.shape)).T
            torch.testing.assert_close(Q.T @ Q, torch.eye(len(own)).double(), rtol=0, atol=1e-10)
            if cell.problem.name in ("mlp", "mlp without bias", "frozen"):
                factored = kronecker_factors(cell.problem.reference, cell.curvature, layer.owner.names)
                turned = Q.T @ factored @ Q
                off = turned - turned.diagonal().diag()
                assert float(off.abs().max()) < 1e-10 * float(turned.abs().max())
                own = (Q * (Q.T @ own @ Q).diagonal()) @ Q.T if state.updated else factored
            elif state.updated:
                own = (Q * (Q.T @ own @ Q).diagonal()) @ Q.T
            else:
                own = (Q * basis.values.flatten()) @ Q.T
        else:
            assert basis.kind == "dense"
        matrix[index[:, None], index] = own
    return exact(cell, block, matrix, shift)


@dataclass(frozen=True)
class Method:
    """A solver, and the inverse that it stands for.

    Args:
        inverse: (cell, block, C_b, μ_b) → H_b.
        definite: whether it needs C + μ ≻ 0; such a solver is an iterative one.
        refused: curvatures that the mathematics does not allow → what the error must name.
    """

    solver: Any
    inverse: Any = exact
    rtol: float = 1e-8
    definite: bool = False
    refused: tuple[str, ...] = ()
    allowed: str = ""


ROWS = r"(?s)ConjugateGradient|Dense|\"fisher\""
METHODS = {
    "Gram": Method(Gram(), refused=("hessian",), allowed=ROWS),
    "Dense": Method(Dense()),
    "CG": Method(ConjugateGradient(rtol=1e-12), definite=True),
    "CG by columns, Jacobi": Method(
        ConjugateGradient(rtol=1e-12, block=False, preconditioner=preconditioners.Jacobi()), definite=True
    ),
    "Lissa": Method(Lissa(depth=DEPTH), neumann, definite=True),
    "Arnoldi": Method(Arnoldi(WHOLE, tolerance=1e-12)),
    "Arnoldi of low rank": Method(Arnoldi(RANK, tolerance=1e-12), largest_pairs, rtol=1e-6),
    "Nystroem": Method(Nystroem(WHOLE), refused=("hessian",), allowed=r'"ggn", "fisher".*Arnoldi'),
    "Nystroem of low rank": Method(
        Nystroem(RANK, seed=2), nystroem, 1e-6, refused=("hessian",), allowed=r'"ggn", "fisher".*Arnoldi'
    ),
    "HarmonicMean": Method(
        HarmonicMean(),
        mean_of_inverses,
        refused=("hessian", "ggn", "true_fisher"),
        allowed='curvature "fisher" or "mc_fisher"',
    ),
    "Kfac": Method(Kfac(), kronecker, refused=("hessian",), allowed='"mc_fisher"'),
    "Ekfac": Method(Ekfac(), kronecker, refused=("hessian",), allowed='"mc_fisher"'),
    "Sketched, narrow": Method(Sketched(rf.sketches.Rademacher(8, seed=4), corrected=False), sketched),
    "Sketched, wide": Method(Sketched(rf.sketches.Gaussian(30, seed=4), corrected=False), sketched),
    "Identity": Method(Identity(), lambda cell, block, C, shift: torch.eye(len(C)).double()),
}


@dataclass
class Cell:
    """One choice of everything."""

    method: str
    curvature: str
    structure: str
    model: str
    batch_size: int
    weighted: bool
    several: bool
    dampings: tuple[float, ...] = DAMPINGS
    influence: Any = None

    @property
    def problem(self) -> Problem:
        return problem(self.model, self.weighted)

    @property
    def solver(self) -> Any:
        return METHODS[self.method].solver

    @property
    def kind(self) -> str:
        return type(self.solver).__name__

    def __str__(self) -> str:
        return f"{self.method}-{self.curvature}-{self.structure}-{self.model}-{self.batch_size}"


VARIANTS = ("CG by columns, Jacobi", "Arnoldi of low rank", "Nystroem of low rank", "Sketched, narrow")


def design():
    cells = []
    models = list(MODELS)
    for (i, method), (j, curvature) in itertools.product(enumerate(METHODS), enumerate(CURVATURES)):
        places = ((i + j) % 4, (i + j + 2) % 4)
        for k in places[: 1 if method in VARIANTS else 2]:
            turn = (3 * i + j) // 2 + k // 2
            model = models[(i + 2 * j + 3 * (k // 2)) % len(models)]
            size, weighted, several = (N, 6)[turn % 2], bool((i + j // 2 + k // 2) % 2), bool((turn // 2 + j) % 2)
            dampings = DAMPINGS[(turn + j) % 3 :] + DAMPINGS[: (turn + j) % 3]
            if curvature == "hessian" and METHODS[method].definite:
                dampings = dampings[:1]  # next to the weight decay that makes it positive all are alike
                size = N  # by passes: the operators' own tests have uneven batches
            cells.append(Cell(method, curvature, STRUCTURES[k], model, size, weighted, several, dampings))
    return cells


CELLS = design()


def l2_of(cell):
    """Weight decay; what makes an indefinite Hessian positive for a solver that needs it."""
    if cell.curvature == "hessian" and METHODS[cell.method].definite:
        return 0.05 - min(0.0, float(torch.linalg.eigvalsh(cell.problem.curvature("hessian"))[0]))
    return 0.02 if cell.several else 0.0


def fit(cell, l2=0.0, damping=0.1):
    influence = rf.Influence(
        cell.problem.task(l2=l2),
        curvature=cell.curvature,
        solver=cell.solver,
        blocks=cell.problem.blocks(cell.structure),
        damping=damping,
        batch_size=cell.batch_size,
        samples=SAMPLES,
        seed=SEED,
        progress=False,
    )
    return influence.fit(cell.problem.train, weights=cell.problem.weights)


@pytest.mark.parametrize("cell", [c for c in CELLS if c.curvature not in METHODS[c.method].refused], ids=str)
def test_it_is_its_inverse_on_all_entries(cell):
    method, l2 = METHODS[cell.method], l2_of(cell)
    matrices = cell.problem.curvatures(cell.curvature, cell.structure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if cell.curvature == "hessian" and not method.definite else "error")
        # torch's own, where it first loads what forward-mode differentiation needs.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        fitted = fit(cell, l2)
        for damping in cell.dampings:
            each = {b: damping * (1 + i * cell.several) for i, b in enumerate(matrices)}
            cell.influence = fitted.at(each if cell.several else damping)
            found = cell.influence.score(cell.problem.test).values
            inverses = {b: method.inverse(cell, b, C, each[b] + l2) for b, C in matrices.items()}
            expected, own, products = cell.problem.expected(cell.structure, inverses)
            close(found, expected, method.rtol)
            # These take the same solves again, so not at every damping of a cell.
            if damping in cell.dampings[: 1 if method.definite else 2]:
                close(cell.influence.self_influence(), own, method.rtol)
                close(cell.influence.inverse_hvp(cell.problem.test), products, method.rtol)


@pytest.mark.parametrize("cell", [c for c in CELLS if c.curvature in METHODS[c.method].refused], ids=str)
def test_what_the_mathematics_does_not_allow_names_what_does(cell):
    with pytest.raises((PlanError, SolverError), match=METHODS[cell.method].allowed):
        fit(cell)


@pytest.mark.parametrize("method", ["CG", "CG by columns, Jacobi", "Lissa to a tolerance"])
@pytest.mark.parametrize("model", [name for name in MODELS if name != "frozen"])
def test_negative_curvature_is_an_error_that_names_what_works(method, model):
    """The frozen model is linear in what is left, so that its Hessian is positive."""
    cell = Cell(method, "hessian", "full", model, N, weighted=False, several=False)
    with pytest.raises(SolverError, match=r"(?i)damping above|fisher|ggn"):
        fit(cell).score(cell.problem.test)


METHODS["Lissa to a tolerance"] = Method(Lissa(tolerance=1e-9))


@pytest.mark.parametrize(
    ("model", "curvature"), [("mlp", "fisher"), ("tied", "ggn"), ("mlp", "true_fisher"), ("tied", "mc_fisher")]
)
def test_lissa_is_the_damped_inverse_to_its_tolerance_where_the_conditioning_is_good(model, curvature):
    cell = Cell("Lissa to a tolerance", curvature, "module", model, 6, True, False)
    influence = fit(cell, damping=0.1)
    matrices = cell.problem.curvatures(curvature, "module")
    expected = cell.problem.expected("module", {b: exact(cell, b, C, 0.1) for b, C in matrices.items()})
    close(influence.score(cell.problem.test).values, expected[0], 1e-7)
    close(influence.self_influence(), expected[1], 1e-7)


def test_every_pair_of_choices_occurs():
    choices = {
        "kind": sorted({type(method.solver).__name__ for method in METHODS.values()}),
        "curvature": CURVATURES,
        "structure": STRUCTURES,
        "model": list(MODELS),
        "batch_size": (N, 6),
    }
    for (one, some), (other, others) in itertools.combinations(choices.items(), 2):
        found = {(getattr(cell, one), getattr(cell, other)) for cell in CELLS}
        assert found == set(itertools.product(some, others)), (one, other)
    for kind in ("weighted", "several"):
        for other, others in choices.items():
            found = {(getattr(cell, kind), getattr(cell, other)) for cell in CELLS}
            assert found == set(itertools.product((False, True), others)), (kind, other)
