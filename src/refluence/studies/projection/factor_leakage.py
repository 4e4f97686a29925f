"""Leakage of a factorised sketch P_A ⊗ P_E, part by part: which of the two sizes governs which part.

A test gradient a ⊗ e of a layer splits into range ⊗ range and three parts outside: ker A ⊗ range E, range A ⊗ ker E and
ker A ⊗ ker E, whose leakage falls as m_A^{-1/2}, m_E^{-1/2} and (m_A m_E)^{-1/2}.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.errors import DataError
from refluence.gradients.outer import OuterBlock
from refluence.studies.folder import StudyFolder
from refluence.studies.projection.problem import BLOCK, Problem
from refluence.studies.projection.record import Recorded

PARTS = ("ker A ⊗ range E", "range A ⊗ ker E", "ker A ⊗ ker E")
CUT = 1e-10


@dataclass(frozen=True)
class FactorGrid(Recorded):
    """The factorised part of the study.

    Args:
        factor_rows: train examples of the factors A and E; few, so that both have a kernel.
        factor_tests: tests whose leakage is measured.
        factor_exp_min, factor_exp_max: both factors' sketches have 2^min … 2^max rows.
        factor_draws: sketches of each pair of sizes; 0 leaves the factorised part out.
        factor_damping: λ as a share of ‖A‖‖E‖.

    Raises:
        DataError: an empty range, or no rows.
    """

    factor_rows: int = 32
    factor_tests: int = 50
    factor_exp_min: int = 3
    factor_exp_max: int = 7
    factor_draws: int = 100
    factor_damping: float = 1e-2

    def __post_init__(self) -> None:
        if not 0 <= self.factor_exp_min <= self.factor_exp_max or min(self.factor_rows, self.factor_tests) < 1:
            raise DataError(f"the factorised part has no sizes or no rows: {self}")
        if self.factor_draws < 0 or not self.factor_damping > 0:
            raise DataError(f"factor_draws must not be negative and factor_damping must be > 0: {self}")

    @property
    def sizes(self) -> list[int]:
        """Rows of either factor's sketch."""
        return [2**e for e in range(self.factor_exp_min, self.factor_exp_max + 1)]


@dataclass(frozen=True, eq=False)
class LayerPair:
    """One layer's train and test gradients as outer products, with A and E of the train examples.

    Args:
        inputs: a of the train examples (n, d_A), with the 1 of a bias.
        errors: e of the train examples (n, d_E).
        test_inputs, test_errors: of the tests.
    """

    inputs: Float64[Tensor, "n a"]
    errors: Float64[Tensor, "n e"]
    test_inputs: Float64[Tensor, "k a"]
    test_errors: Float64[Tensor, "k e"]

    def split(self, side: str) -> tuple[Tensor, Tensor]:
        """(in the range, in the kernel) of the tests' a or e."""
        own, tests = (self.inputs, self.test_inputs) if side == "inputs" else (self.errors, self.test_errors)
        _, values, basis = torch.linalg.svd(own, full_matrices=False)
        basis = basis[values > CUT**0.5 * values[0]]
        inside = tests @ basis.T @ basis
        rest = tests - inside
        rest = torch.where(rest.norm(dim=1, keepdim=True) > 1e-6 * tests.norm(dim=1, keepdim=True), rest, 0.0)
        return inside, rest


def first_layer(problem: Problem, grid: FactorGrid) -> LayerPair | None:
    """The first layer whose gradients are single outer products, on the first rows; None where there is none."""
    found = []
    for which, count in (("train", grid.factor_rows), ("test", grid.factor_tests)):
        inputs: list[Tensor] = []
        errors: list[Tensor] = []
        for start, blocks in problem.rows(which):
            if start >= count:
                break
            outer = [b for b in blocks[BLOCK].blocks if isinstance(b, OuterBlock) and b.single is not None]
            if not outer:
                return None
            assert outer[0].single is not None
            rows, columns = (side.double() for side in outer[0].single)
            if outer[0].bias:
                columns = torch.cat([columns, torch.ones_like(columns[:, :1])], dim=1)
            inputs.append(columns[: count - start])
            errors.append(rows[: count - start])
        found += [torch.cat(inputs).cpu(), torch.cat(errors).cpu()]
    return LayerPair(*found)


def factor_leakage(folder: StudyFolder, problem: Problem, grid: FactorGrid, seed: int) -> pd.DataFrame | None:
    """One row a part and pair of sizes: root mean square leakage, measured and predicted; None where it is left out."""
    if grid.factor_draws == 0 or (pair := first_layer(problem, grid)) is None:
        return None
    rows = []
    for m_a in grid.sizes:
        for m_e in grid.sizes:
            stage = folder.stage(
                f"factorised/{m_a:06d}x{m_e:06d}",
                lambda m_a=m_a, m_e=m_e: (measured_parts(pair, grid, seed, m_a, m_e), {}),  # type: ignore[misc]
            )
            measured, predicted = stage.tensors["measured"], stage.tensors["predicted"]
            for part, name in enumerate(PARTS):
                if float(predicted[part]) > 0:
                    both = float(measured[part].sqrt()), float(predicted[part].sqrt())
                    rows.append(
                        {"part": name, "m_A": m_a, "m_E": m_e, "measured": both[0], "predicted": both[1]}
                        | {"ratio": both[0] / both[1]}
                    )
    return pd.DataFrame(rows) if rows else None


def measured_parts(pair: LayerPair, grid: FactorGrid, seed: int, m_a: int, m_e: int) -> dict[str, Tensor]:
    """Mean squares of the leakage of the three parts over draws, train examples and tests."""
    generator = np.random.default_rng([seed, m_a, m_e])
    inside_a, outside_a = pair.split("inputs")
    inside_e, outside_e = pair.split("errors")
    n = len(pair.inputs)
    norms = (torch.linalg.matrix_norm(side, 2).square() / n for side in (pair.inputs, pair.errors))
    damping = grid.factor_damping * float(torch.stack(list(norms)).prod())
    measured = torch.zeros(3, dtype=torch.float64)
    predicted = torch.zeros(3, dtype=torch.float64)
    squares_a, squares_e = outside_a.square().sum(dim=1), outside_e.square().sum(dim=1)
    for _ in range(grid.factor_draws):
        sketch_a, sketch_e = (
            torch.from_numpy(generator.standard_normal((m, side.shape[1]))) / m**0.5
            for m, side in ((m_a, pair.inputs), (m_e, pair.errors))
        )
        values_a, basis_a = _eigenvectors(pair.inputs @ sketch_a.T)
        values_e, basis_e = _eigenvectors(pair.errors @ sketch_e.T)
        to_a, to_e = sketch_a.T @ basis_a, sketch_e.T @ basis_e
        # Z_i = (P_A a_i)(P_E e_i)ᵀ ÷ (α γ + λ), in both eigenbases
        solved = (pair.inputs @ to_a)[:, :, None] * (pair.errors @ to_e)[:, None, :]
        solved = solved / (torch.outer(values_a, values_e) + damping)
        in_a, out_a, in_e, out_e = inside_a @ to_a, outside_a @ to_a, inside_e @ to_e, outside_e @ to_e
        by_e, by_out_e = torch.einsum("npq,kq->nkp", solved, in_e), torch.einsum("npq,kq->nkp", solved, out_e)
        for part, (rows, left) in enumerate(((out_a, by_e), (in_a, by_out_e), (out_a, by_out_e))):
            measured[part] += torch.einsum("nkp,kp->nk", left, rows).square().mean()
        by_a = torch.einsum("npq,kp->nkq", solved, in_a)
        predicted[0] += (by_e.square().sum(dim=2) * squares_a).mean() / m_a
        predicted[1] += (by_a.square().sum(dim=2) * squares_e).mean() / m_e
        predicted[2] += solved.square().sum(dim=(1, 2)).mean() * (squares_a * squares_e).mean() / (m_a * m_e)
    return {"measured": measured / grid.factor_draws, "predicted": predicted / grid.factor_draws}


def _eigenvectors(rows: Float64[Tensor, "n m"]) -> tuple[Float64[Tensor, " m"], Float64[Tensor, "m m"]]:
    """Of the mean of the rows' outer products."""
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    return values.clamp(min=0.0), vectors
