"""The arms: ways of choosing k train rows, each from the train images alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from refluence.selection import d_optimal, herding, k_center, select
from refluence.studies.leverage_basis.bases import CLASSIFICATION, RAW, REGRESSION, RELU, UNTRAINED
from refluence.studies.leverage_basis.options import Options

GREEDY = ("d_optimal", "k_center", "herding")
D_OPTIMAL_RATIO = 1e-2
"""λ of D-optimal design over the mean eigenvalue of XᵀX/n."""


@dataclass(frozen=True)
class Arm:
    """A way of choosing rows.

    Args:
        name: of the arm.
        title: in figures and tables.
        source: the group of bases, "el2n", "grand", or "" for none.
        kind: "plain" or "ridge" leverage, or "" for other scores.
        method: of `rf.select`; the greedy ones are orders that are made once.
        balanced: as many rows of every class.
        weighted: train with the importance weights.
    """

    name: str
    title: str
    source: str
    kind: str
    method: str
    balanced: bool = False
    weighted: bool = False

    @property
    def is_random(self) -> bool:
        """Whether another seed chooses other rows of the same scores."""
        return self.method in ("random", "distinct_sampling")


def arms(options: Options) -> tuple[Arm, ...]:
    """Every arm of the study."""
    relu = f"{RELU}_{options.relu[0]}"
    found = [
        Arm("random", "random", "", "", "random"),
        Arm("random_balanced", "random, class-balanced", "", "", "random", balanced=True),
    ]
    for source in (RAW, CLASSIFICATION, REGRESSION, UNTRAINED):
        words = "raw pixels" if source == RAW else source
        sampled = f"{words}: sampled ∝ ridge leverage"
        found += [
            Arm(f"{source}_top", f"{words}: top", source, "plain", "top"),
            Arm(f"{source}_bottom", f"{words}: bottom", source, "plain", "bottom"),
            Arm(f"{source}_ridge_top", f"{words}: ridge top", source, "ridge", "top"),
            Arm(f"{source}_top_balanced", f"{words}: top, class-balanced", source, "plain", "top", balanced=True),
            Arm(f"{source}_sampled", sampled, source, "ridge", "distinct_sampling"),
            Arm(f"{source}_weighted", f"{sampled}, weighted", source, "ridge", "distinct_sampling", weighted=True),
        ]
    found += [Arm(f"{relu}_top", "random ReLU features: top", relu, "plain", "top")]
    found += [Arm(f"{RAW}_{method}", f"raw pixels: {_words(method)}", RAW, "", method) for method in GREEDY]
    found += [Arm(f"{name}_top", f"{title}: top", name, "", "top") for name, title in DIFFICULTY.items()]
    return tuple(found)


DIFFICULTY = {"el2n": "EL2N", "grand": "GraNd"}


def _words(method: str) -> str:
    return {"d_optimal": "D-optimal", "k_center": "k-center", "herding": "herding"}[method]


@dataclass(frozen=True, eq=False)
class Chooser:
    """Rows of every arm.

    Args:
        labels: of the train rows.
        scores: (basis or difficulty, kind) → a score of every train row.
        orders: greedy method → the first rows that it chooses.
    """

    labels: Int64[Tensor, " n"]
    scores: Mapping[tuple[str, str], Float64[Tensor, " n"]]
    orders: Mapping[str, Int64[Tensor, " k"]]

    def rows(self, arm: Arm, k: int, seed: int) -> tuple[Int64[Tensor, " k"], Float64[Tensor, " k"]] | None:
        """The rows of an arm and weights of mean 1; None for greedy methods beyond where their order was made."""
        if arm.method in GREEDY:
            order = self.orders[arm.method]
            return (order[:k], torch.ones(k, dtype=torch.float64)) if k <= len(order) else None
        scores = torch.ones(len(self.labels), dtype=torch.float64) if arm.source == "" else self._scores(arm, seed)
        chosen = select(scores, k, arm.method, labels=self.labels if arm.balanced else None, seed=seed, progress=False)
        weights = chosen.weights / chosen.weights.mean() if arm.weighted else torch.ones(k, dtype=torch.float64)
        return chosen.indices, weights

    def _scores(self, arm: Arm, seed: int) -> Float64[Tensor, " n"]:
        own = self.scores.get((arm.source, arm.kind))
        return self.scores[f"{arm.source}_{seed}", arm.kind] if own is None else own


def greedy_orders(pixels: Float64[Tensor, "n d"], limit: int, progress: bool) -> dict[str, Int64[Tensor, " k"]]:
    """The first `limit` rows of every greedy method in the pixels of the train images."""
    k = min(limit, len(pixels))
    ridge = D_OPTIMAL_RATIO * float(pixels.square().mean())
    return {
        "d_optimal": d_optimal(pixels, k, ridge, progress=progress),
        "k_center": k_center(pixels, k, progress=progress),
        "herding": herding(pixels, k, progress=progress),
    }
