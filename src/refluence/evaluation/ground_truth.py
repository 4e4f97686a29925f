"""Ground truth: what models trained on parts of the data measure on the test examples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from refluence.errors import DataError
from refluence.files import replacing

FILE = "ground_truth.safetensors"
"""In the folder of a retraining, when it is finished."""
_FORMAT = "refluence ground truth 1"


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Measurements of models trained on m subsets of n train examples, on k test examples, by s seeds a subset.

    Args:
        masks: (m, n), True where the example was trained on.
        measurements: name → (m, s, k) in float64, lower is better: "loss", for a classifier also "margin" (−log p/(1−p)
            of the label), and "measurement" where the task has its own.
        baseline: name → (s', k): the same of models trained on all examples; None where there are none.
        manifest: how they were trained: JSON-able.

    Raises:
        DataError: shapes that do not belong together.
    """

    masks: Bool[Tensor, "m n"]
    measurements: Mapping[str, Float64[Tensor, "m s k"]]
    baseline: Mapping[str, Float64[Tensor, "r k"]] | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.masks.ndim != 2 or self.masks.dtype != torch.bool:
            raise DataError(
                f"masks must be boolean (subsets, examples), not {self.masks.dtype} {tuple(self.masks.shape)}"
            )
        for name, values in self.measurements.items():
            if values.ndim != 3 or values.shape[0] != self.masks.shape[0]:
                raise DataError(
                    f"measurement {name!r} has shape {tuple(values.shape)}; it must be (subsets, seeds, tests) with "
                    f"{self.masks.shape[0]} subsets"
                )

    def __repr__(self) -> str:
        seeds = next(iter(self.measurements.values())).shape[1]
        return (
            f"GroundTruth({self.n_subsets} subsets of {self.n_train} train examples, {seeds} model(s) each, "
            f"{self.n_test} tests, measurements {', '.join(self.measurements)})"
        )

    @property
    def n_train(self) -> int:
        """The number of train examples, n."""
        return self.masks.shape[1]

    @property
    def n_subsets(self) -> int:
        """The number of subsets, m."""
        return self.masks.shape[0]

    @property
    def n_test(self) -> int:
        """The number of test examples, k."""
        return next(iter(self.measurements.values())).shape[2]

    def values(self, measurement: str = "loss") -> Float64[Tensor, "m k"]:
        """The measurement of each subset's models on each test example, mean over seeds.

        Raises:
            DataError: a measurement that was not taken.
        """
        return self._of(self.measurements, measurement).mean(dim=1)

    def changes(self, measurement: str = "loss") -> Float64[Tensor, "m k"]:
        """`values` minus the same of models trained on all examples: what leaving the rest out did.

        Raises:
            DataError: no such measurement, or no models trained on all examples.
        """
        if self.baseline is None:
            raise DataError("this ground truth has no models trained on all examples: retrain with baseline=1")
        return self.values(measurement) - self._of(self.baseline, measurement).mean(dim=0)

    def tests(self, rows: Any) -> GroundTruth:
        """The same for some of the test examples: their rows, or a mask of all."""
        rows = torch.as_tensor(rows)
        if rows.dtype == torch.bool:
            if rows.shape != (self.n_test,):
                raise DataError(f"a mask of test examples must have {self.n_test} entries, not {tuple(rows.shape)}")
            rows = rows.nonzero()[:, 0]
        rows = rows.long()
        if wrong := [row for row in rows.tolist() if not 0 <= row < self.n_test]:
            raise DataError(f"there is no test row {wrong[0]}: the test rows are 0 to {self.n_test - 1}")
        baseline = None if self.baseline is None else {k: v[:, rows] for k, v in self.baseline.items()}
        measured = {name: values[:, :, rows] for name, values in self.measurements.items()}
        return GroundTruth(self.masks, measured, baseline, self.manifest)

    def to_frame(self, measurement: str = "loss") -> pd.DataFrame:
        """One row for each subset, seed and test example: subset, seed, test, removed (examples left out), value."""
        values = self._of(self.measurements, measurement)
        m, s, k = values.shape
        index = pd.MultiIndex.from_product([range(m), range(s), range(k)], names=["subset", "seed", "test"])
        frame = pd.DataFrame({"value": values.reshape(-1).numpy()}, index=index).reset_index()
        frame.insert(3, "removed", (~self.masks).sum(dim=1).numpy()[frame["subset"]])
        return frame

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, at once."""
        path = Path(path)
        tensors = {"masks": self.masks} | {f"measurements/{k}": v for k, v in self.measurements.items()}
        tensors |= {f"baseline/{k}": v for k, v in (self.baseline or {}).items()}
        metadata = {"format": _FORMAT, "manifest": json.dumps(dict(self.manifest))}
        with replacing(path) as temporary:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)
        return path

    @staticmethod
    def load(path: str | Path) -> GroundTruth:
        """What `save` wrote, or `retrain` into its folder.

        Raises:
            DataError: no such file, or another kind of file.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read as a ground truth: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise DataError(f"{path} holds no ground truth (format {metadata.get('format')!r}, not {_FORMAT!r})")
        parts: dict[str, dict[str, Tensor]] = {"measurements": {}, "baseline": {}}
        for name, tensor in tensors.items():
            kind, _, key = name.partition("/")
            if key:
                parts[kind][key] = tensor
        return GroundTruth(
            tensors["masks"], parts["measurements"], parts["baseline"] or None, json.loads(metadata["manifest"])
        )

    @staticmethod
    def _of(measured: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in measured:
            raise DataError(f"no measurement {name!r} was taken: use one of {', '.join(measured)}")
        return measured[name]
