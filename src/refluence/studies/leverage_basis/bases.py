"""The bases: what each image is a row of, and its leverage there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.damping import EffectiveDimension
from refluence.errors import DataError
from refluence.leverage import leverage_scores
from refluence.studies.leverage_basis.images import Images
from refluence.studies.leverage_basis.networks import one_hot_loss
from refluence.studies.leverage_basis.options import Options
from refluence.training import stream

RAW, RELU = "raw", "relu"
CLASSIFICATION, REGRESSION, UNTRAINED = "classification", "regression", "untrained"
LOSSES: dict[str, str | Callable[..., Tensor]] = {CLASSIFICATION: "cross_entropy", REGRESSION: one_hot_loss}
"""How the embedding of each group is trained; `UNTRAINED` is not."""
NETWORKS = (CLASSIFICATION, REGRESSION, UNTRAINED)
LETTERS = {CLASSIFICATION: "A", REGRESSION: "B", UNTRAINED: "C"}
KINDS = ("plain", "ridge")
PARTS = ("all", "train")


@dataclass(frozen=True)
class Basis:
    """One basis.

    Args:
        group: bases that differ by their seed alone.
        seed: of the group of a network; 0 of pixels and random features.
        label: in figures.
    """

    name: str
    group: str
    seed: int
    label: str


def bases(options: Options) -> tuple[Basis, ...]:
    """Pixels, random features, and every network's embedding."""
    fixed = [Basis(RAW, RAW, 0, "raw")]
    fixed += [Basis(f"{RELU}_{width}", f"{RELU}_{width}", 0, f"ReLU {width}") for width in options.relu]
    return (
        *fixed,
        *(
            Basis(f"{group}_{seed}", group, seed, f"{LETTERS[group]}{seed}")
            for group in NETWORKS
            for seed in range(1, options.seeds + 1)
        ),
    )


def random_features(pixels: Float64[Tensor, "n d"], width: int) -> Float64[Tensor, "n w"]:
    """relu(XW)/√w with W of independent standard normal entries."""
    generator = torch.Generator().manual_seed(stream(0, f"relu features {width}"))
    weights = torch.randn(pixels.shape[1], width, generator=generator, dtype=torch.float64)
    return (pixels @ weights).relu() / math.sqrt(width)


def leverages(
    features: Float64[Tensor, "n d"], images: Images, options: Options, name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Plain and ridge leverage among all images, and among the train images alone, and what is known of them.

    Raises:
        DataError: the rank does not exceed the effective dimension that is asked for.
    """
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {
        "columns": features.shape[1],
        "zero_columns": int((features.abs().amax(dim=0) == 0).sum()),
    }
    for part, rows in zip(PARTS, (features, features[: images.n_train]), strict=True):
        plain = leverage_scores(rows, progress=False)
        assert plain.rank is not None
        if plain.rank <= options.dimension:
            raise DataError(
                f"the basis {name} has rank {plain.rank}, so that no ridge gives it the effective dimension "
                f"{options.dimension:g}: give a smaller --dimension"
            )
        ridge = leverage_scores(rows, EffectiveDimension(options.dimension), progress=False)
        tensors |= {f"plain_{part}": plain.values, f"ridge_{part}": ridge.values}
        facts |= {
            f"rank_{part}": plain.rank,
            f"sum_{part}": float(plain.values.sum()),
            f"max_plain_{part}": float(plain.values.max()),
            f"max_ridge_{part}": float(ridge.values.max()),
            f"damping_{part}": ridge.damping,
            f"effective_dimension_{part}": float(ridge.values.sum()),
        }
    return tensors, facts
