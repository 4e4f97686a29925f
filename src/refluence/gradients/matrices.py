"""Where the layers of a group of parameters stand among its columns."""

from __future__ import annotations

from dataclasses import dataclass

from refluence.gradients.joint import Stretches


@dataclass(frozen=True)
class LayerMatrix:
    """A layer's parameters: a matrix, row by row, and with `bias` a vector of its rows after it.

    A layer whose gradient is no sum of outer products is a matrix of one column.

    Args:
        names: the parameters.
        rows, columns: of the matrix.
        bias: whether the vector belongs to it.
        outer: whether its gradients are sums of outer products.
        stretches: (first column in the layer, length, first column in the group) of each stretch of the columns.
    """

    names: tuple[str, ...]
    rows: int
    columns: int
    bias: bool
    outer: bool
    stretches: Stretches

    @property
    def at(self) -> int:
        """The first column in the group: what tells its layers apart."""
        return self.stretches[0][2]

    @property
    def width(self) -> int:
        """Columns of the matrix, the vector included."""
        return self.columns + self.bias
