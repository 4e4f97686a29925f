"""What is explained: a built-in data set and model, or what the user's function returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import typer

from refluence.cli.user_task import call, load_function
from refluence.errors import DataError
from refluence.report.presentation import Presentation
from refluence.task import Task
from refluence.zoo import Benchmark, build_model, dataset_names, load_benchmark, load_dataset, model_names


@dataclass(frozen=True)
class Problem:
    """A task with its data; `benchmark` where it comes from the zoo, or the user's function gave one."""

    title: str
    task: Task
    train: Any
    test: Any
    presentation: Presentation
    benchmark: Benchmark | None = None


@dataclass(frozen=True)
class Source:
    """Where the problem comes from, as given on the command line."""

    dataset: str | None = None
    model: str = "mlp"
    task: str | None = None
    seed: int = 0
    label_noise: float = 0.0
    l2: float = 0.0
    n_train: int | None = None
    n_test: int | None = None
    retrain: bool = False

    def check(self) -> None:
        """Raise typer.BadParameter unless the names are known and the options go together."""
        if (self.dataset is None) == (self.task is None):
            raise typer.BadParameter(
                f"give either --dataset ({', '.join(dataset_names())}) or --task MODULE:FUNCTION",
                param_hint="--dataset / --task",
            )
        if self.dataset is None:
            built_in = {
                "--label-noise": self.label_noise != 0,
                "--l2": self.l2 != 0,
                "--n-train": self.n_train is not None,
                "--n-test": self.n_test is not None,
                "--retrain": self.retrain,
            }
            for option in (option for option, given in built_in.items() if given):
                raise typer.BadParameter("is for built-in data sets; your function decides that", param_hint=option)
            return
        if self.dataset not in dataset_names():
            raise typer.BadParameter(
                f"unknown data set {self.dataset!r}: use one of {', '.join(dataset_names())}", param_hint="--dataset"
            )
        if self.model not in model_names(self.dataset):
            raise typer.BadParameter(
                f"no model {self.model!r} for {self.dataset}: use one of {', '.join(model_names(self.dataset))}",
                param_hint="--model",
            )

    def load(self, *, progress: bool = True) -> Problem:
        """The trained problem.

        Raises:
            typer.BadParameter: unknown names.
            RefluenceError: what loading refuses, or the user's function.
        """
        self.check()
        if self.dataset is None:
            assert self.task is not None
            return problem_from(call(load_function(self.task), self.task), self.task)
        benchmark = load_benchmark(
            self.dataset,
            self.model,
            seed=self.seed,
            label_noise=self.label_noise,
            progress=progress,
            retrain=self.retrain,
            l2=self.l2,
            n_train=self.n_train,
            n_test=self.n_test,
        )
        return problem_from(benchmark, f"{self.dataset} {self.model}")

    def load_untrained(self) -> Problem:
        """The problem with a built-in model as initialised: enough to plan, and nothing has to be trained.

        Raises:
            typer.BadParameter: unknown names.
            RefluenceError: what loading refuses, or the user's function.
        """
        self.check()
        if self.dataset is None:
            return self.load()
        split = load_dataset(self.dataset, n_train=self.n_train, n_test=self.n_test)
        task = Task(build_model(self.dataset, self.model), l2=self.l2)
        return Problem(f"{self.dataset} {self.model}", task, split.train, split.test, Presentation())


def problem_from(given: Any, name: str) -> Problem:
    """The problem in what a function returned: (task, train, test), the same with a Presentation, or a Benchmark.

    Raises:
        DataError: anything else.
    """
    if isinstance(given, Benchmark):
        return Problem(name, given.task, given.train, given.test, given.presentation, given)
    parts = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    if len(parts) == 3:
        parts = (*parts, Presentation())
    if len(parts) != 4 or not isinstance(parts[0], Task) or not isinstance(parts[3], Presentation):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise DataError(
            f"{name} returned ({kinds}); it must return (task, train, test) with an rf.Task first, the same and a "
            "refluence.report.Presentation, or a refluence.zoo.Benchmark"
        )
    return Problem(name, *parts)
