"""How far a sketched score is from the exact one: its standard error, from the sketch that made it.

With s_ij = (Pv_i)ᵀ(PCPᵀ+μI)⁻²(Pg_j) a sketch of m rows with independent entries has to first order

    Var τ̃_ij = κ²/(mκ') · (s_ii s_jj + s_ij²),    κ²/(mκ') = 1/tr (PCPᵀ+μI)⁻²

about the exact score at κ, 1/κ = (1/m) tr (PCPᵀ+μI)⁻¹, κ' = dκ/dμ. Gradients outside the range of C are in s_ii too.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from refluence.sketches import SJLT, Sketch
from refluence.sketches.dense import DenseSketch


def has_error_formula(sketch: Sketch) -> bool:
    """Whether the formula holds for this kind of P: independent entries, or sparse columns that behave like them."""
    return isinstance(sketch, (DenseSketch, SJLT))


def standard_errors(
    cross: Float[Tensor, "k n"], of_tests: Float[Tensor, " k"], of_train: Float[Tensor, " n"], scale: float
) -> Float[Tensor, "k n"]:
    """√(κ²/(mκ') · (s_ii s_jj + s_ij²)) of every pair, in the memory of `cross`.

    Args:
        cross: s_ij of test i with train j.
        of_tests, of_train: s_ii and s_jj.
        scale: κ²/(mκ'), `rf.theory.sketch_variance_scale`.
    """
    return cross.square_().addr_(of_tests, of_train).mul_(scale).sqrt_()
