"""The settings of the study, and the defaults for each data set."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from refluence.errors import DataError

FORMAT = 1


@dataclass(frozen=True)
class Options:
    """One run of the study.

    Args:
        dataset: of the zoo, images of one channel.
        n_train, n_test: rows that are read; None: the data set's own.
        seeds: of every network, and of every random choice; 1, …, seeds.
        channels: of the two convolutions of the embedding network.
        embedding: width of its linear layer, the basis.
        relu: widths of the bases of random ReLU features.
        epochs: of the embedding networks, on batches of 64.
        dimension: d_λ of the ridge leverage, in every basis.
        sizes: numbers k of selected rows; the whole train set is added.
        greedy: largest k of the greedy methods (D-optimal, k-center, herding).
        hidden: width of the network that is trained on the selections.
        steps: of its training on batches of 64.
        convolutional_sizes: sizes at which the embedding's architecture is trained on selections too.
        convolutional_steps: of these trainings; no more than 15 epochs.
        early_models, early_epochs: the ensemble of EL2N and GraNd.
    """

    dataset: str = "mnist"
    n_train: int | None = 60_000
    n_test: int | None = 10_000
    seeds: int = 5
    channels: tuple[int, int] = (32, 64)
    embedding: int = 200
    relu: tuple[int, int] = (784, 200)
    epochs: int = 5
    dimension: float = 20.0
    sizes: tuple[int, ...] = (10, 50, 200, 1_000, 5_000, 10_000, 20_000)
    greedy: int = 1_000
    hidden: int = 128
    steps: int = 1_000
    convolutional_sizes: tuple[int, ...] = (1_000, 5_000, 10_000, 20_000)
    convolutional_steps: int = 800
    early_models: int = 10
    early_epochs: int = 1

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise DataError(f"the study compares seeds, so it needs 2 at the least, not {self.seeds}")
        for name in ("sizes", "convolutional_sizes"):
            if any(k < 1 for k in getattr(self, name)):
                raise DataError(f"{name} must be numbers of rows, at least 1 each, not {getattr(self, name)}")

    def record(self) -> dict[str, Any]:
        """All that the numbers depend on, JSON-able."""
        return {"format": FORMAT, **asdict(self)}


MNIST = Options()
DIGITS = Options(
    dataset="digits",
    n_train=None,
    n_test=None,
    channels=(8, 16),
    embedding=32,
    relu=(64, 32),
    epochs=20,
    dimension=8.0,
    sizes=(10, 30, 100, 300, 800),
    greedy=100,
    hidden=32,
    steps=300,
    convolutional_sizes=(300, 800),
    convolutional_steps=200,
    early_models=5,
    early_epochs=5,
)
DEFAULTS = {"mnist": MNIST, "digits": DIGITS}
