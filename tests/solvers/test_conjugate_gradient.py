"""Conjugate gradients on block-diagonal curvatures against dense solves, with every preconditioner."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from refluence.curvature import Curvature
from refluence.errors import PlanError, SolverError
from refluence.solvers.conjugate_gradient import ConjugateGradient
from refluence.solvers.preconditioners import Jacobi, Nystroem, PreconditionerState
from refluence.solvers.state import Solution

SIZES = {"a": 30, "b": 7, "c": 12}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Blocks(Curvature):
    """Dense matrices; products in the dtype of the vectors, counted as passes."""

    def __init__(self, matrices, dtype=torch.float64, positive=True):
        self.matrices, self.positive, self.weights, self.name = (
            matrices,
            positive,
            None,
            "ggn" if positive else "hessian",
        )
        self.passes = []
        self.rows = SimpleNamespace(
            n=10,
            batches=SimpleNamespace(whole=10),
            groups=tuple(matrices),
            dimension=lambda group: len(matrices[group]),
            device=torch.device("cpu"),
            dtype=dtype,
            progress=False,
        )

    def matvec(self, vectors):
        self.passes.append(next(iter(vectors.values())).dtype)
        return {block: self.matrices[block].to(v.dtype) @ v for block, v in vectors.items()}


def matrices(scale=1.0, seed=0):
    out = {}
    for i, (block, d) in enumerate(SIZES.items()):
        factor = normal(d, max(2, d // 2), seed=seed + i) * torch.logspace(0, -2, max(2, d // 2))
        out[block] = scale**i * factor @ factor.T
    return out


def right(k, seed=100):
    return {block: normal(k, d, seed=seed + i).T for i, (block, d) in enumerate(SIZES.items())}


def dense(blocks, vectors, shifts):
    return {b: torch.linalg.solve(blocks[b] + shifts[b] * torch.eye(len(blocks[b])), v) for b, v in vectors.items()}


class Exact:
    """A solver object as any other: the damped inverse of each block, somewhat off."""

    def prepare(self, curvature):
        return ExactState({block: m * 1.3 for block, m in curvature.matrices.items()})

    def restore(self, curvature, tensors):
        return ExactState(tensors)

    def cost(self, w):
        raise NotImplementedError


class ExactState(PreconditionerState):
    def __init__(self, blocks):
        self.blocks = blocks

    def solve(self, vectors, shifts):
        wide = {block: v.double() for block, v in vectors.items()}
        return Solution(dense(self.blocks, wide, shifts))

    def export(self):
        return self.blocks


PRECONDITIONERS = {
    "none": None,
    "jacobi": Jacobi(),
    "jacobi by probes": Jacobi(probes=50, seed=1),
    "nystroem": Nystroem(4),
    "nystroem of full rank": Nystroem(1000),
    "a solver": Exact(),
}
any_preconditioner = pytest.mark.parametrize("preconditioner", PRECONDITIONERS.values(), ids=PRECONDITIONERS.keys())
any_block = pytest.mark.parametrize("block", [True, False], ids=["block", "columns"])


@any_block
@any_preconditioner
@pytest.mark.parametrize(
    ("dtype", "damping", "k"),
    [(torch.float64, 1e-1, 60), (torch.float64, 1e-3, 3), (torch.float32, 1e-1, 60), (torch.float32, 1e-2, 3)],
)
def test_equals_the_dense_solve(dtype, damping, k, preconditioner, block):
    blocks, vectors = matrices(2.0), right(k)
    curvature = Blocks(blocks, dtype)
    shifts = {name: damping * (i + 1) for i, name in enumerate(SIZES)}
    state = ConjugateGradient(rtol=1e-9, maxiter=4000, preconditioner=preconditioner, block=block).prepare(curvature)
    found = state.solve(vectors, shifts)
    expected = dense(blocks, vectors, shifts)
    for name, values in found.values.items():
        assert values.dtype == torch.float64
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()))
    residual = torch.cat([blocks[b] @ s + shifts[b] * s - vectors[b] for b, s in found.values.items()]).norm(dim=0)
    torch.testing.assert_close(
        found.residual, residual / torch.cat(list(vectors.values())).norm(dim=0), rtol=0.1, atol=1e-10
    )
    assert (found.residual <= 1e-9).all()
    assert found.converged.all()
    facts = state.diagnostics
    assert facts["residual"] == found.residual.tolist()
    assert facts["iterations"] == found.iterations.tolist()
    assert facts["converged"] == k
    assert facts["products"] > max(facts["iterations"])
    assert (torch.float32 in curvature.passes) == (dtype == torch.float32)


def test_all_blocks_share_a_pass():
    curvature = Blocks(matrices())
    state = ConjugateGradient(rtol=1e-6).prepare(curvature)
    found = state.solve(right(5), dict.fromkeys(SIZES, 0.1))
    assert len(curvature.passes) == int(found.iterations.max()) + 1 == state.diagnostics["products"]


def test_some_blocks_alone():
    blocks, vectors = matrices(), right(3)
    state = ConjugateGradient(preconditioner=Nystroem(5)).prepare(Blocks(blocks))
    found = state.solve({"c": vectors["c"]}, dict.fromkeys(SIZES, 0.1))
    torch.testing.assert_close(
        found.values["c"], dense(blocks, {"c": vectors["c"]}, {"c": 0.1})["c"], rtol=1e-4, atol=1e-5
    )


@any_block
def test_tiles_of_right_hand_sides(monkeypatch, block):
    import refluence.solvers.conjugate_gradient as module

    solver, vectors, shifts = ConjugateGradient(rtol=1e-12, block=block), right(11), dict.fromkeys(SIZES, 0.1)
    whole = solver.prepare(Blocks(matrices())).solve(vectors, shifts)
    monkeypatch.setattr(module, "TILE_BYTES", 4 * module.ENTRY_BYTES * sum(SIZES.values()))
    state = solver.prepare(Blocks(matrices()))
    tiled = state.solve(vectors, shifts)
    for name in SIZES:
        torch.testing.assert_close(tiled.values[name], whole.values[name], rtol=1e-8, atol=1e-9)
    assert len(tiled.residual) == len(state.diagnostics["iterations"]) == 11


@any_preconditioner
def test_restored_without_preparation(preconditioner):
    curvature, vectors, shifts = Blocks(matrices()), right(4), dict.fromkeys(SIZES, 0.1)
    solver = ConjugateGradient(preconditioner=preconditioner)
    state = solver.prepare(curvature)
    tensors = {name: tensor.clone() for name, tensor in state.export().items()}
    curvature.passes.clear()
    again = solver.restore(curvature, tensors)
    assert not curvature.passes
    for name, values in again.solve(vectors, shifts).values.items():
        torch.testing.assert_close(values, state.solve(vectors, shifts).values[name])


def test_the_nystroem_preconditioner_is_its_formula():
    d, mu = 30, 0.05
    blocks = {"a": matrices()["a"]}
    prepared = Nystroem(6).prepare(Blocks(blocks))
    U, s = prepared.factors["a"]
    expected = (s[-1] + mu) * U @ torch.diag(1 / (s + mu)) @ U.T + torch.eye(d) - U @ U.T
    found = prepared.solve({"a": torch.eye(d, dtype=torch.float64)}, {"a": mu}).values["a"] * (s[-1] + mu)
    torch.testing.assert_close(found, expected)
    assert torch.linalg.eigvalsh((found + found.T) / 2)[0] > 0


def test_nystroem_of_twice_the_effective_dimension_leaves_few_steps():
    d = 300
    basis = torch.linalg.qr(normal(d, d))[0]
    eigenvalues, mu = 10 * torch.arange(1, d + 1, dtype=torch.float64) ** -2, 1e-2
    curvature = Blocks({"a": (basis * eigenvalues) @ basis.T})
    rank = 2 * int((eigenvalues / (eigenvalues + mu)).sum())
    steps = [
        int(
            ConjugateGradient(preconditioner=p, block=False)
            .prepare(curvature)
            .solve({"a": normal(d, 3)}, {"a": mu})
            .iterations.max()
        )
        for p in (None, Nystroem(rank))
    ]
    assert steps[1] <= 8
    assert steps[0] > 2.5 * steps[1]


def test_jacobi_of_a_diagonal_curvature_needs_one_step():
    blocks = {block: torch.diag(torch.logspace(0, 4, d, dtype=torch.float64)) for block, d in SIZES.items()}
    for jacobi in (Jacobi(), Jacobi(probes=2)):
        found = (
            ConjugateGradient(preconditioner=jacobi).prepare(Blocks(blocks)).solve(right(3), dict.fromkeys(SIZES, 0.1))
        )
        assert found.iterations.max() == 1


@any_block
def test_negative_curvature_is_an_error(block):
    blocks = matrices()
    blocks["b"] = blocks["b"] - 0.7 * torch.eye(7)
    curvature = Blocks(blocks, positive=False)
    solver = ConjugateGradient(block=block)
    with pytest.raises(SolverError, match=r"negative curvature.*damping"):
        solver.prepare(curvature).solve(right(3), dict.fromkeys(SIZES, 0.1))
    assert solver.prepare(curvature).solve(right(3), dict.fromkeys(SIZES, 0.8)).converged.all()
    with pytest.raises(PlanError, match="hessian"):
        ConjugateGradient(preconditioner=Nystroem(3)).prepare(curvature)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_too_few_steps_warn_with_the_residual(dtype):
    state = ConjugateGradient(maxiter=2, block=False).prepare(Blocks(matrices(), dtype))
    with pytest.warns(
        RuntimeWarning, match=r"maxiter=2 steps: 4 of 4 right-hand sides .* above rtol=1e-06.*Raise maxiter"
    ):
        found = state.solve(right(4), dict.fromkeys(SIZES, 1e-3))
    assert not found.converged.any()
    assert state.diagnostics["converged"] == 0


def test_a_tolerance_below_the_rounding_warns():
    state = ConjugateGradient(rtol=1e-18).prepare(Blocks(matrices()))
    with pytest.warns(RuntimeWarning, match="met the rounding"):
        found = state.solve(right(4), dict.fromkeys(SIZES, 1e-2))
    assert (found.residual < 1e-12).all()


def test_zero_right_hand_sides():
    vectors = right(3)
    for v in vectors.values():
        v[:, 1] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ConjugateGradient().prepare(Blocks(matrices())).solve(vectors, dict.fromkeys(SIZES, 0.1))
        assert all((v[:, 1] == 0).all() for v in found.values.values())
        empty = ConjugateGradient().prepare(Blocks(matrices())).solve(right(0), dict.fromkeys(SIZES, 0.1))
    assert found.residual[1] == 0
    assert empty.values["a"].shape == (30, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": 0.0}, "one of them must be positive"),
        ({"rtol": 1.0}, "rtol must lie"),
        ({"atol": -1.0}, "must not be negative"),
        ({"maxiter": 0}, "at least one step"),
        ({"preconditioner": ConjugateGradient()}, "ConjugateGradient cannot precondition"),
    ],
)
def test_impossible_options_are_errors(options, message):
    with pytest.raises(PlanError, match=message):
        ConjugateGradient(**options)


def test_impossible_preconditioners_are_errors():
    with pytest.raises(PlanError, match="at least 1"):
        Nystroem(0)
    with pytest.raises(PlanError, match="probe"):
        Jacobi(probes=0)


def test_a_condition_beyond_float32_is_solved_in_float64():
    blocks, vectors, shifts = matrices(10.0), right(5), dict.fromkeys(SIZES, 1e-3)
    curvature = Blocks(blocks, torch.float32)
    found = ConjugateGradient(rtol=1e-8, preconditioner=Nystroem(8)).prepare(curvature).solve(vectors, shifts)
    assert found.converged.all()
    assert curvature.passes.count(torch.float64) > 5
    residual = torch.cat([blocks[b] @ s + 1e-3 * s - vectors[b] for b, s in found.values.items()]).norm(dim=0)
    assert (residual <= 1.01e-8 * torch.cat(list(vectors.values())).norm(dim=0)).all()
