"""Rows in fewer bytes, and the error that makes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Rounded:
    """Rows as a store holds them.

    Attributes:
        stored: the numbers; of bfloat16, which numpy lacks, the bits as uint16.
        exponents: float16 holds x·2^−e with e such that the largest |x| of its row is below 2^e, so that rows of tiny
            gradients lose no more digits than others; None for other dtypes.
        squared_error, squared_norm: Σ (x − x̂)² and Σ x².
    """

    stored: NDArray
    exponents: NDArray | None
    squared_error: float
    squared_norm: float


def rounded(rows: Float[Tensor, "b m"], dtype: torch.dtype) -> Rounded:
    """Rows in another dtype."""
    exponents = None
    values = rows.detach().cpu().contiguous()
    if dtype == torch.float16:
        exponents = torch.frexp(values.abs().amax(dim=1)).exponent
        kept = (values.double() * _power(-exponents)).to(dtype)
    else:
        kept = values.to(dtype)
    array = kept.view(torch.uint16).numpy() if dtype == torch.bfloat16 else kept.numpy()
    found = None if exponents is None else exponents.to(torch.int16).numpy()
    if dtype == values.dtype:
        return Rounded(array, found, 0.0, float(values.double().square().sum()))
    lost = values.double() - restored(array, found, values.dtype).double()
    return Rounded(array, found, float(lost.square().sum()), float(values.double().square().sum()))


def restored(stored: NDArray, exponents: NDArray | None, dtype: torch.dtype) -> Float[Tensor, "b m"]:
    """The rows x̂ that a store holds, in the dtype of the gradients."""
    values = torch.from_numpy(stored)
    if values.dtype == torch.uint16:
        return values.view(torch.bfloat16).to(dtype)
    if exponents is None:
        return values.to(dtype)
    return (values.double() * _power(torch.from_numpy(exponents))).to(dtype)


def relative_error(squared_error: float, squared_norm: float) -> float:
    """‖X − X̂‖/‖X‖ in the Frobenius norm."""
    return float(np.sqrt(squared_error / squared_norm)) if squared_norm > 0 else 0.0


def _power(exponents: Tensor) -> Tensor:
    return torch.pow(torch.tensor(2.0, dtype=torch.float64), exponents.double())[:, None]
