"""Whose leverage is wanted: a file, the inputs of a built-in data set, or a layer of a model trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from refluence.layer_features import features
from refluence.zoo import dataset_names, load_benchmark, load_dataset, model_names


@dataclass(frozen=True, eq=False)
class Rows:
    """The matrix, and what is known of its rows beside it: labels, pictures (n, C, H, W) in bytes."""

    X: Any
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    images: Tensor | None = None


@dataclass(frozen=True)
class Source:
    """As given on the command line."""

    input_file: Path | None
    columns: list[str] | None
    dataset: str | None
    model: str | None
    layer: str | None
    part: str
    n_train: int | None
    n_test: int | None
    seed: int

    @property
    def title(self) -> str:
        """What it is, in words."""
        if self.input_file is not None:
            return self.input_file.name
        return f"{self.dataset} ({self.part} rows)" + (f", {self.model} layer {self.layer}" if self.model else "")

    def check(self) -> None:
        """Raise typer.BadParameter unless the options go together and the names are known."""
        if (self.input_file is None) == (self.dataset is None):
            raise typer.BadParameter("give either a file or a data set", param_hint="--input / --dataset")
        if self.input_file is not None:
            of_sets = {"--model": self.model, "--layer": self.layer, "--n-train": self.n_train, "--n-test": self.n_test}
            for option, value in of_sets.items():
                if value is not None:
                    raise typer.BadParameter("is for built-in data sets", param_hint=option)
            return
        if self.columns is not None:
            raise typer.BadParameter("is for --input with a table", param_hint="--columns")
        if self.dataset not in dataset_names():
            raise typer.BadParameter(
                f"unknown data set {self.dataset!r}: use one of {', '.join(dataset_names())}", param_hint="--dataset"
            )
        if (self.model is None) != (self.layer is None):
            raise typer.BadParameter("a model and a layer of it go together", param_hint="--model / --layer")
        if self.model is not None and self.model not in model_names(self.dataset):
            raise typer.BadParameter(
                f"no model {self.model!r} for {self.dataset}: use one of {', '.join(model_names(self.dataset))}",
                param_hint="--model",
            )

    def load(self, *, progress: bool = True) -> Rows:
        """The matrix with its labels and pictures.

        Raises:
            typer.BadParameter: tokens without a layer.
            RefluenceError: what loading refuses.
        """
        if self.input_file is not None:
            return Rows(self.input_file)
        assert self.dataset is not None
        data = load_dataset(self.dataset, n_train=self.n_train, n_test=self.n_test, progress=progress)
        x, labels = self._part(data.train, data.test)
        pictures = None if data.image is None else data.image.pixels(x)
        if self.model is None:
            if pictures is None:
                raise typer.BadParameter(f"{self.dataset} holds tokens: name a model's layer", param_hint="--layer")
            return Rows(pictures.flatten(1).double() / 255, labels, data.class_names, pictures)
        return Rows(self._embedded(x, progress), labels if labels.ndim == 1 else None, data.class_names, pictures)

    def _embedded(self, x: Tensor, progress: bool) -> Tensor:
        assert self.dataset is not None
        assert self.model is not None
        assert self.layer is not None
        benchmark = load_benchmark(
            self.dataset, self.model, seed=self.seed, progress=progress, n_train=self.n_train, n_test=self.n_test
        )
        return features(benchmark.task.model, self.layer, (x,), progress=progress)

    def _part(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self.part == "all":
            return torch.cat([train[0], test[0]]), torch.cat([train[1], test[1]])
        return train if self.part == "train" else test
