"""The settings of Koh & Liang's Figure 2, and the data that they name."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from refluence.errors import DataError
from refluence.zoo import load_dataset

FORMAT = 1
TRUNCATED, TRUNCATED_MEAN = "lissa_truncated", "lissa_truncated_mean"


@dataclass(frozen=True)
class Setting:
    """A data set, a model and what is removed.

    Args:
        name: of the setting.
        dataset: of the zoo.
        title: what it is, in a sentence.
        n_train, n_test: rows of the data set that are read; None: its own.
        skipped: train rows left out at the start, as the paper's validation rows.
        drawn: train rows drawn at random; None: all.
        bias: whether the softmax regression has one.
        l2: of all parameters.
        test: test row; None: the first that the model gets wrong.
        top: examples of largest |influence| that are removed, each alone.
        batch: examples of a step of automatic LiSSA; None: all.
        seeds: of LiSSA with the paper's parameters.
        truncated: of LiSSA with the parameters of a published reproduction, which are shown too.
    """

    name: str
    dataset: str
    title: str
    n_train: int | None
    n_test: int | None
    skipped: int
    drawn: int | None
    bias: bool
    l2: float
    test: int | None
    top: int
    batch: int | None = None
    seeds: int = 5
    truncated: tuple[str, ...] = ()


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            "paper",
            "mnist",
            "MNIST without its first 5,000 train images, softmax regression without bias, as in the paper",
            60_000,
            10_000,
            skipped=5_000,
            drawn=None,
            bias=False,
            l2=0.01,
            test=8,
            top=500,
            batch=512,
        ),
        Setting(
            "reduced",
            "mnist",
            "20,000 random train images of MNIST, softmax regression with bias, as in a published reproduction",
            60_000,
            10_000,
            skipped=0,
            drawn=20_000,
            bias=True,
            l2=1e-3,
            test=None,
            top=200,
            batch=512,
            truncated=(TRUNCATED, TRUNCATED_MEAN),
        ),
        Setting(
            "digits",
            "digits",
            "1,200 random train images of scikit-learn's digits, softmax regression with bias",
            None,
            None,
            skipped=0,
            drawn=1_200,
            bias=True,
            l2=1e-3,
            test=None,
            top=200,
            truncated=(TRUNCATED_MEAN,),
        ),
    )
}


@dataclass(frozen=True)
class Options:
    """One run of the study: a setting, how many subsets, and the first seed."""

    setting: Setting
    seed: int
    subsets: int
    top: int

    def record(self) -> dict[str, Any]:
        """All that the numbers depend on, JSON-able."""
        return {
            "format": FORMAT,
            **{f"setting_{key}" if key == "name" else key: value for key, value in asdict(self.setting).items()},
            "top": self.top,
            "seed": self.seed,
            "subsets": self.subsets,
        }


@dataclass(frozen=True, eq=False)
class Problem:
    """Pixels in 0…1 that vary in the train rows, flat and in float64, and labels; `rows` are rows of the train set.

    A pixel that is 0 in every train image has no gradient but its own l2 term, so its weights are 0 at the minimum
    and stay 0 whatever is removed: leaving it out changes no number.
    """

    train: tuple[Float64[Tensor, "n p"], Int64[Tensor, " n"]]
    test: tuple[Float64[Tensor, "k p"], Int64[Tensor, " k"]]
    rows: Int64[Tensor, " n"]
    pixels: int

    @property
    def varying(self) -> int:
        """Pixels that vary, p."""
        return self.train[0].shape[1]


def load_problem(setting: Setting, seed: int) -> Problem:
    """The data of one subset.

    Raises:
        DataError: the data set is not on this machine.
    """
    try:
        data = load_dataset(setting.dataset, n_train=setting.n_train, n_test=setting.n_test)
    except DataError as error:
        raise DataError(f"{error}\nOr run the study on the digits, which need no download: --test-mode") from error
    image = data.image
    assert image is not None
    x, test = (
        ((part * image.std + image.mean) * 255).round().flatten(1).double() / 255
        if setting.dataset == "mnist"
        else part.flatten(1).double()
        for part in (data.train[0], data.test[0])
    )
    rows = torch.arange(setting.skipped, len(x))
    if setting.drawn is not None:
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: setting.drawn]]
    x = x[rows]
    varying = x.amax(dim=0) > 0
    labels = data.train[1][rows], data.test[1]
    return Problem(
        (x[:, varying].contiguous(), labels[0]), (test[:, varying].contiguous(), labels[1]), rows, len(varying)
    )
