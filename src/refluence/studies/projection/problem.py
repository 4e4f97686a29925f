"""What is studied: a trained model of the zoo, its gradients, and their spectrum, computed once."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence._version import __version__
from refluence.batches import Batches
from refluence.errors import DataError
from refluence.execution import Execution, usable_device
from refluence.gradients.capture import Capture
from refluence.gradients.groups import parameter_groups
from refluence.gradients.kernels import cross_grams, gram_matrices
from refluence.gradients.rows import GradientRows
from refluence.settings import model_fingerprint
from refluence.studies.folder import StudyFolder
from refluence.studies.projection.record import Recorded
from refluence.studies.projection.spectral import RANK_CUT, Spectral
from refluence.training.files import read_tensors, write_tensors
from refluence.zoo import load_benchmark
from refluence.zoo.benchmark import Benchmark
from refluence.zoo.checkpoints import data_hash

BLOCK = "full"
SHARE_OF_MEMORY = 0.4
FORMAT = 1
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class ProblemOptions(Recorded):
    """A data set and a trained model of the zoo.

    Args:
        dataset, model: of the zoo.
        n_train, n_test: rows; None: the published numbers.
        num_test_grads: of the test rows, the first so many are used.
        epochs: of training, instead of the recipe's.
        model_seed: of training.
        dtype: in which the gradients are made; their inner products are float64 always.
        device: where all is computed; None: the CPU.
        batch_size: rows a forward pass; changes no number.
        rank_cut: eigenvalues above rank_cut·σ_max count for τ_0.
    """

    UNRECORDED = ("batch_size", "device")

    dataset: str = "mnist"
    model: str = "mlp"
    n_train: int | None = None
    n_test: int | None = None
    num_test_grads: int = 500
    epochs: int | None = None
    model_seed: int = 0
    dtype: str = "float64"
    device: str | None = None
    batch_size: int = 256
    rank_cut: float = RANK_CUT

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise DataError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if not 0 <= self.rank_cut < 1:
            raise DataError(f"rank_cut must lie in [0, 1), not {self.rank_cut!r}")


@dataclass(eq=False)
class Problem:
    """The benchmark that the options name, and what is computed of it.

    Args:
        options: which.
        progress: show how far long passes are.
    """

    options: ProblemOptions
    progress: bool = True

    @cached_property
    def benchmark(self) -> Benchmark:
        """The trained model with its data.

        Raises:
            DataError: an unknown name, or data that is not on this machine.
        """
        asked = self.options
        return load_benchmark(
            asked.dataset,
            asked.model,
            seed=asked.model_seed,
            n_train=asked.n_train,
            n_test=asked.n_test,
            epochs=asked.epochs,
            progress=self.progress,
        )

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """The train rows."""
        return self.benchmark.train

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """The test rows that are used."""
        x, y = self.benchmark.test
        return x[: self.options.num_test_grads], y[: self.options.num_test_grads]

    @property
    def device(self) -> torch.device:
        """Where all is computed."""
        return usable_device(self.options.device or "cpu")

    @property
    def parameters(self) -> int:
        """d."""
        return sum(p.numel() for p in self.benchmark.task.model.parameters() if p.requires_grad)

    @cached_property
    def capture(self) -> Capture:
        """Makes the gradients of a copy of the model, in the dtype and on the device asked for."""
        task = self.benchmark.task
        model = copy.deepcopy(task.model).to(device=self.device, dtype=DTYPES[self.options.dtype])
        groups = parameter_groups(model, task.parameter_names(), BLOCK)
        return Capture(task, model, groups, self._batches(self.train, "train"))

    def rows(self, which: str) -> GradientRows:
        """The gradients of the "train" or "test" rows."""
        data = self.train if which == "train" else self.test
        share = SHARE_OF_MEMORY if which == "train" else SHARE_OF_MEMORY / 2
        memory = int(share * Execution().budget(self.device))
        batches = self._batches(data, which)
        return GradientRows(self.capture, batches, self.capture.loss, memory, self.progress)

    def _batches(self, data: Any, name: str) -> Batches:
        return Batches(data, self.options.batch_size, self.device, DTYPES[self.options.dtype], name)

    def gram(self) -> Float64[Tensor, "N N"]:
        """Inner products of all gradients, the train rows first."""
        train, test = self.rows("train"), self.rows("test")
        own, tests = gram_matrices(train)[BLOCK], gram_matrices(test)[BLOCK]
        across = cross_grams(train, test)[BLOCK]
        return torch.cat([torch.cat([own, across], dim=1), torch.cat([across.T, tests], dim=1)])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the trained weights, the rows and all else that the spectrum depends on."""
        made_by = {"refluence": __version__, "torch": torch.__version__, "format": FORMAT, "dtype": self.options.dtype}
        weights = model_fingerprint(self.benchmark.task.model)
        data = [data_hash(self.train), data_hash(self.test)]
        return hashlib.sha256(json.dumps([weights, *data, made_by], sort_keys=True).encode()).hexdigest()

    def spectral(self, folder: StudyFolder, cache_dir: Path | None = None) -> Spectral:
        """The spectrum and the coordinates, from the folder, from the cache that studies share, or computed now."""
        place = folder.path / "stages" / "spectrum.safetensors"
        if cache_dir is not None:
            place = cache_dir / f"spectrum-{self.fingerprint[:16]}.safetensors"
        found = read_tensors(place)
        if found is None or found[1].get("fingerprint") != self.fingerprint:
            spectral = Spectral.of_gram(self.gram(), len(self.train[0]))
            place.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(place, spectral.tensors(), {"fingerprint": self.fingerprint})
            # read back, so that the layout in memory, and with it the rounding, is that of a later run
            found = read_tensors(place)
            if found is None:
                raise DataError(f"{place} cannot be read back: is the disk full?")
        return Spectral.restored(found[0], self.options.rank_cut, self.device)

    def facts(self) -> dict[str, Any]:
        """What every summary says of the problem."""
        return {
            "dataset": self.options.dataset,
            "model": self.options.model,
            "n": len(self.train[0]),
            "tests": len(self.test[0]),
            "parameters": self.parameters,
            "test_accuracy": self.benchmark.accuracy,
            "train_loss": self.benchmark.train_loss,
        }
