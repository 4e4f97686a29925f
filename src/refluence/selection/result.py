"""What a selection is: rows, their weights, and how they were chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from refluence.errors import DataError
from refluence.training.files import read_tensors, write_tensors

FORMAT = "refluence selection 1"


@dataclass(frozen=True, eq=False)
class Selection:
    """Distinct rows of n, in the order in which they were chosen.

    Args:
        indices: the rows, each once.
        weights: w_i. Of random choices Σ_{i chosen} w_i f(i) has the expectation Σ_i f(i) over all n rows, for every
            f; of all others they are 1 and say nothing.
        n: rows there were to choose from.
        method: of `rf.select`.
        settings: of the method, JSON-able.
    """

    indices: Int64[Tensor, " k"]
    weights: Float64[Tensor, " k"]
    n: int
    method: str
    settings: Mapping[str, Any]

    def __len__(self) -> int:
        """The number of rows chosen; of "sampling" it may be below the number of draws."""
        return len(self.indices)

    def to_frame(self) -> pd.DataFrame:
        """One row a chosen row: rank (from 1), row, weight."""
        return pd.DataFrame(
            {"rank": range(1, len(self) + 1), "row": self.indices.numpy(), "weight": self.weights.numpy()}
        )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, in one step.

        Raises:
            DataError: the path holds something else than a selection.
        """
        path = Path(path)
        if path.exists() and not _is_selection(read_tensors(path)):
            raise DataError(f"{path} exists and holds no selection: choose another path")
        facts = {"format": FORMAT, "n": self.n, "method": self.method, "settings": dict(self.settings)}
        write_tensors(path, {"indices": self.indices, "weights": self.weights}, {"facts": json.dumps(facts)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read what `save` wrote.

        Raises:
            DataError: the path holds no selection.
        """
        found = read_tensors(Path(path))
        if found is None or not _is_selection(found):
            raise DataError(f"{path} holds no selection: it should be a file that Selection.save wrote")
        facts = json.loads(found[1]["facts"])
        return cls(found[0]["indices"], found[0]["weights"], facts["n"], facts["method"], facts["settings"])

    def __repr__(self) -> str:
        return f"Selection({len(self)} of {self.n} rows by {self.method})"


def _is_selection(found: tuple[Mapping[str, Tensor], Mapping[str, str]] | None) -> bool:
    return found is not None and json.loads(found[1].get("facts", "{}")).get("format") == FORMAT


def unweighted(indices: Int64[Tensor, " k"]) -> Float64[Tensor, " k"]:
    """The weights of a choice that is not random."""
    return torch.ones(len(indices), dtype=torch.float64)
