"""Utility of sketched scores: the LDS of every size and damping, without forming scores.

Σ_{i∈S} τ̃_ij for all subsets S is one more sketched system, whose left side is summed over the subsets first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float64, Int64
from scipy.stats import rankdata
from torch import Tensor

from refluence.errors import DataError
from refluence.evaluation import GroundTruth, retrain
from refluence.studies.folder import StudyFolder
from refluence.studies.projection.grid import Sizes
from refluence.studies.projection.problem import Problem
from refluence.studies.projection.record import Recorded
from refluence.studies.projection.spectral import Spectral
from refluence.studies.projection.study import GridOptions, Study
from refluence.studies.projection.system import SketchedSystem


@dataclass(frozen=True)
class Retraining(Recorded):
    """The ground truth: models retrained on random halves.

    Args:
        num_subsets: halves.
        models_per_subset: models of each, whose losses are averaged; 1 as published.
        val_ratio: share of the tests on which λ is chosen; the others are reported.

    Raises:
        DataError: fewer than 3 halves, no model, or a share outside 0…1.
    """

    num_subsets: int = 100
    models_per_subset: int = 1
    val_ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.num_subsets < 3 or self.models_per_subset < 1:
            raise DataError(
                f"num_subsets must be at least 3 and models_per_subset at least 1, not {self.num_subsets} and "
                f"{self.models_per_subset}"
            )
        if not 0 < self.val_ratio < 1:
            raise DataError(f"val_ratio must lie between 0 and 1, not {self.val_ratio!r}")

    def truth(self, problem: Problem, folder: StudyFolder, path: Path | None, progress: bool) -> GroundTruth:
        """The retrained models' losses on the tests that are used; finished models are kept, in the folder or at path.

        Raises:
            DataError: a path that holds another retraining.
        """
        found = retrain(
            problem.benchmark.task,
            problem.benchmark.train,
            problem.benchmark.test,
            self.num_subsets,
            problem.benchmark.recipe,
            seeds=self.models_per_subset,
            path=path or folder.part("ground_truth"),
            progress=progress,
        )
        return found.tests(range(len(problem.test[0])))

    def split(self, tests: int, seed: int) -> tuple[Int64[Tensor, " v"], Int64[Tensor, " t"]]:
        """(validation, reported) rows of the tests: disjoint, at random, each ascending.

        Raises:
            DataError: a share that leaves one of them empty.
        """
        count = round(self.val_ratio * tests)
        if not 0 < count < tests:
            raise DataError(f"val_ratio {self.val_ratio!r} of {tests} tests is {count}: both parts must have some")
        order = torch.randperm(tests, generator=torch.Generator().manual_seed(seed))
        return order[:count].sort().values, order[count:].sort().values


@dataclass(frozen=True)
class UtilityOptions(GridOptions):
    """The settings of a study against retrained models, see `GridOptions`.

    Args:
        sketching: its seed splits the tests too.
        retraining: the ground truth, and the share of the tests on which λ is chosen.
    """

    sizes: Sizes = field(default_factory=lambda: Sizes(m_exp_min=5))
    retraining: Retraining = field(default_factory=Retraining)

    def meter(self, study: Study, ground_truth: Path | None) -> UtilityMeter:
        """Of the LDS at every damping, with models that are retrained now if they are not kept at `ground_truth`."""
        problem, retraining = study.problem, self.retraining
        truth = retraining.truth(problem, study.folder, ground_truth, study.progress)
        split = retraining.split(len(problem.test[0]), self.sketching.seed)
        return UtilityMeter(truth, *split, tuple(self.dampings.values()))


@dataclass(frozen=True, eq=False)
class UtilityMeter:
    """LDS of a sketched system at every damping: mean over tests of Spearman_S(Σ_{i∈S} τ_ij, −loss_j(S)).

    Args:
        truth: models retrained on subsets.
        validation, reported: disjoint rows of the tests.
        dampings: λ.
    """

    truth: GroundTruth
    validation: Int64[Tensor, " v"]
    reported: Int64[Tensor, " t"]
    dampings: tuple[float, ...]

    @cached_property
    def _ranks(self) -> Float64[Tensor, "s k"]:
        return _centred_ranks(-self.truth.values())

    def measure(self, system: SketchedSystem) -> dict[str, Tensor]:
        """LDS at each damping, of the "validation" and of the reported tests ("test")."""
        masks = self.truth.masks.to(system.curvature)
        return self.of_sums(system.summed(masks).scores(self.dampings))

    def of_sums(self, sums: Iterable[Float64[Tensor, "s k"]]) -> dict[str, Tensor]:
        """The same from the sums over subsets at each damping."""
        found = [self.lds(each) for each in sums]
        return {"validation": torch.stack([v for v, _ in found]), "test": torch.stack([t for _, t in found])}

    def exact(self, spectral: Spectral) -> dict[str, Tensor]:
        """The same of the exact scores."""
        masks = self.truth.masks.to(spectral.basis)
        left = spectral.n**0.5 * masks @ spectral.basis
        values, right = spectral.eigenvalues[: spectral.rank], (spectral.tests * spectral.roots).T
        return self.of_sums(left @ (right / (values + damping)[:, None]) for damping in self.dampings)

    def lds(self, sums: Float64[Tensor, "s k"]) -> tuple[Tensor, Tensor]:
        """Mean rank correlation over the validation tests and over the reported ones; constant columns are left out."""
        own = _centred_ranks(sums.cpu())
        lengths = (own.square().sum(dim=0) * self._ranks.square().sum(dim=0)).sqrt()
        correlations = torch.where(lengths > 0, (own * self._ranks).sum(dim=0) / lengths, torch.nan)
        return correlations[self.validation].nanmean(), correlations[self.reported].nanmean()


def _centred_ranks(values: Float64[Tensor, "s k"]) -> Float64[Tensor, "s k"]:
    """Ranks in each column, ties averaged, less their mean."""
    found = torch.from_numpy(rankdata(values.numpy(), axis=0))
    return found - found.mean(dim=0)


def best_damping(dampings: Sequence[float], validation: Float64[Tensor, " l"]) -> int:
    """The place of the damping with the best validation LDS, the smallest of equals.

    Raises:
        DataError: there is none.
    """
    known = torch.nan_to_num(validation, nan=-torch.inf)
    if not bool(torch.isfinite(known).any()):
        raise DataError(f"no damping of {min(dampings):.3g} … {max(dampings):.3g} has an LDS: all scores are constant")
    return int(known.argmax())
