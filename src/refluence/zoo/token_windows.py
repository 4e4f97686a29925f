"""A long sequence of tokens as rows of a data set."""

from __future__ import annotations

from jaxtyping import Int64
from torch import Tensor


def windows(tokens: Int64[Tensor, " t"], length: int) -> tuple[Int64[Tensor, "n length"], Int64[Tensor, "n length"]]:
    """Stretches of a sequence in a row and the same one place later, n = ⌊(t − 1)/length⌋; a rest is left out."""
    count = max(0, (len(tokens) - 1) // length)
    inputs = tokens[: count * length].reshape(count, length)
    return inputs, tokens[1 : count * length + 1].reshape(count, length)
