"""The grids of the studies: sketch sizes, dampings and trials, with the defaults of the published scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from refluence.errors import DataError
from refluence.progress import track
from refluence.studies.folder import Stage, StudyFolder
from refluence.studies.projection.record import Recorded
from refluence.studies.projection.system import SketchedSystem

PROJECTIONS = ("normal", "rademacher", "sjlt")
OFFLOADS = ("none", "cpu", "disk")


@dataclass(frozen=True)
class Sizes(Recorded):
    """Sketch sizes m = 2^min … 2^max: every power of two, or `steps` sizes equally spaced in log m.

    Raises:
        DataError: an empty range.
    """

    m_exp_min: int = 2
    m_exp_max: int = 20
    m_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.m_exp_min <= self.m_exp_max or self.m_steps < 0:
            raise DataError(
                f"the sizes 2^{self.m_exp_min} to 2^{self.m_exp_max} in {self.m_steps} steps are no range: "
                "m_exp_min must lie between 0 and m_exp_max, and m_steps must not be negative"
            )

    def below(self, d: int) -> list[int]:
        """Ascending; sizes of d and more are left out, as published: there is nothing to project.

        Raises:
            DataError: all of them are left out.
        """
        if self.m_steps == 0:
            sizes = [2**e for e in range(self.m_exp_min, self.m_exp_max + 1)]
        else:
            sizes = sorted(
                set(np.logspace(self.m_exp_min, self.m_exp_max, self.m_steps, base=2.0).astype(int).tolist())
            )
        if not (kept := [m for m in sizes if m < d]):
            raise DataError(
                f"all sizes are at least the {d} parameters of the model: lower m_exp_min, {self.m_exp_min}"
            )
        return kept


@dataclass(frozen=True)
class Dampings(Recorded):
    """λ = 10^min … 10^max: every power of ten, or `steps` values equally spaced in log λ.

    Raises:
        DataError: an empty range.
    """

    lambda_exp_min: int = -8
    lambda_exp_max: int = 2
    lambda_steps: int = 0

    def __post_init__(self) -> None:
        if self.lambda_exp_min > self.lambda_exp_max or self.lambda_steps < 0:
            raise DataError(
                f"the dampings 1e{self.lambda_exp_min} to 1e{self.lambda_exp_max} in {self.lambda_steps} steps are no "
                "range: lambda_exp_min must not exceed lambda_exp_max, and lambda_steps must not be negative"
            )

    def values(self) -> list[float]:
        """Ascending."""
        if self.lambda_steps:
            return [float(v) for v in np.logspace(self.lambda_exp_min, self.lambda_exp_max, self.lambda_steps)]
        return [10.0**e for e in range(self.lambda_exp_min, self.lambda_exp_max + 1)]


@dataclass(frozen=True)
class Sketching(Recorded):
    """How the gradients are projected, and how often.

    Args:
        proj_type: "normal", "rademacher" or "sjlt" (one nonzero a column, as published).
        num_trials: independent sketches.
        seed: of the first trial; trial t has seed + t.
        gram_space: draw "normal" sketches of the Gram matrix instead of the gradients: the same law, at a cost that
            does not depend on d.
        offload: where the rows that a real sketch gives are kept: on the device, in main memory, or in a mapped file.

    Raises:
        DataError: an unknown projection or place, or no trial.
    """

    UNRECORDED = ("offload",)

    proj_type: str = "normal"
    num_trials: int = 5
    seed: int = 42
    gram_space: bool = True
    offload: str = "cpu"

    def __post_init__(self) -> None:
        if self.proj_type not in PROJECTIONS:
            raise DataError(f"proj_type must be one of {', '.join(PROJECTIONS)}, not {self.proj_type!r}")
        if self.offload not in OFFLOADS:
            raise DataError(f"offload must be one of {', '.join(OFFLOADS)}, not {self.offload!r}")
        if self.num_trials < 1:
            raise DataError(f"num_trials must be at least 1, not {self.num_trials}")


@runtime_checkable
class SketchSource(Protocol):
    """Makes the sketched systems of one trial, for ascending sizes, each from what the smaller ones have."""

    def systems(self, seed: int, sizes: Sequence[int], wanted: set[int]) -> Iterator[SketchedSystem]:
        """The systems of the wanted sizes, ascending; which are wanted changes no number."""
        ...


Measure = Callable[[SketchedSystem], dict[str, Tensor]]


def measure_grid(
    folder: StudyFolder,
    source: Callable[[], SketchSource],
    sketching: Sketching,
    sizes: Sequence[int],
    measure: Measure,
    progress: bool,
    part: str = "grid",
    only: Sequence[int] | None = None,
) -> Iterator[tuple[int, int, Stage]]:
    """(trial, m, what `measure` found) for every trial and size; what is kept is read, the rest is measured and kept.

    A kill loses one size of one trial at most. The source is made only when something is left to do. With `only` some
    of the sizes are measured, of the same nested sketches.
    """
    places = [(trial, m) for trial in range(sketching.num_trials) for m in only or sizes]
    names = {place: f"{part}/trial{place[0]}/m{place[1]:08d}" for place in places}
    left = {place for place in places if not folder.is_done(names[place])}
    made: SketchSource | None = None
    running: Iterator[SketchedSystem] | None = None
    running_trial = -1
    for trial, m in track(places, "trials and sizes", len(places), enabled=progress and bool(left)):
        if (trial, m) in left:
            made = made or source()
            if running is None or running_trial != trial:
                wanted = {size for t, size in left if t == trial}
                running, running_trial = made.systems(sketching.seed + trial, sizes, wanted), trial
            work = partial(_measured, measure, running, m)
            yield trial, m, folder.stage(names[trial, m], work)
        else:
            yield trial, m, folder.stage(names[trial, m], _never)


def _measured(
    measure: Measure, systems: Iterator[SketchedSystem], m: int
) -> tuple[dict[str, Tensor], dict[str, object]]:
    system = next(systems)
    assert system.size == m, "a source gives the wanted sizes in ascending order"
    return {name: tensor.cpu() for name, tensor in measure(system).items()}, {}


def _never() -> tuple[dict[str, Tensor], dict[str, object]]:
    raise DataError("a finished stage vanished while the study ran: start it again")
