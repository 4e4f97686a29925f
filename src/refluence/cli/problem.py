"""What is explained: a built-in data set and model, or what the user's function returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any

import typer
from torch import nn

from refluence.cli.user_task import call, load_function
from refluence.distributed.recipe import is_loader
from refluence.errors import DataError
from refluence.execution import Execution
from refluence.report.presentation import Presentation
from refluence.task import Task
from refluence.training import Recipe
from refluence.zoo import Benchmark, build_model, dataset_names, load_benchmark, load_train, model_names
from refluence.zoo.benchmark import load_untrained


@dataclass(frozen=True)
class Problem:
    """A task with its data; `benchmark` where it comes from the zoo, or the user's function gave one.

    `recipe` is how the model was trained, `build` makes an untrained one, and `loader` gives the train rows in another
    process too, where they are known.
    """

    title: str
    task: Task
    train: Any
    test: Any
    presentation: Presentation
    benchmark: Benchmark | None = None
    recipe: Recipe | None = None
    build: Callable[[], nn.Module] | None = None
    loader: TrainRows | None = None

    def rows_for(self, execution: Execution) -> Any:
        """The train rows as a fit takes them: for a cluster, where that is known, as its workers load them."""
        return self.train if execution.cluster is None or self.loader is None else self.loader


@dataclass(frozen=True, eq=False)
class TrainRows:
    """Train rows as a function: in this process those that are here; another process is sent `load` instead of them."""

    rows: Any
    load: Callable[[], Any]

    def __call__(self) -> Any:
        """The rows."""
        return self.rows

    def __reduce__(self) -> tuple[Any, ...]:
        return itemgetter(0), ((self.load,),)


@dataclass(frozen=True)
class Source:
    """Where the problem comes from, as given on the command line."""

    dataset: str | None = None
    model: str = "mlp"
    task: str | None = None
    seed: int = 0
    label_noise: float = 0.0
    l2: float | None = None
    n_train: int | None = None
    n_test: int | None = None
    retrain: bool = False
    epochs: int | None = None

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
                "--l2": self.l2 is not None,
                "--n-train": self.n_train is not None,
                "--n-test": self.n_test is not None,
                "--retrain": self.retrain,
                "--epochs": self.epochs is not None,
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
            epochs=self.epochs,
        )
        problem = problem_from(benchmark, f"{self.dataset} {self.model}")
        load = partial(load_train, self.dataset, self.model, self.seed, self.label_noise, n_train=self.n_train)
        build = partial(build_model, self.dataset, self.model)
        return replace(problem, build=build, loader=TrainRows(problem.train, load))

    def load_untrained(self) -> Problem:
        """The problem with a built-in model as initialised: enough to plan, and nothing has to be trained.

        Raises:
            typer.BadParameter: unknown names.
            RefluenceError: what loading refuses, or the user's function.
        """
        self.check()
        if self.dataset is None:
            return self.load()
        task, train, test = load_untrained(
            self.dataset, self.model, l2=self.l2, n_train=self.n_train, n_test=self.n_test
        )
        return Problem(f"{self.dataset} {self.model}", task, train, test, Presentation())


def problem_from(given: Any, name: str) -> Problem:
    """The problem in what a function returned: a Benchmark, or (task, train, test), which a Presentation, a Recipe or
    both may follow.

    Raises:
        DataError: anything else.
    """
    if isinstance(given, Benchmark):
        return Problem(name, given.task, given.train, given.test, given.presentation, given, given.recipe)
    parts = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    shown = [part for part in parts[3:] if isinstance(part, Presentation)]
    recipes = [part for part in parts[3:] if isinstance(part, Recipe)]
    understood = len(shown) <= 1 and len(recipes) <= 1 and len(parts) == 3 + len(shown) + len(recipes)
    if not understood or not isinstance(parts[0], Task):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise DataError(
            f"{name} returned ({kinds}); it must return (task, train, test) with an rf.Task first, which a "
            "refluence.report.Presentation and a refluence.training.Recipe may follow, or a refluence.zoo.Benchmark"
        )
    task, train, test = parts[:3]
    loader = TrainRows(call(train, name), train) if is_loader(train) else None
    return Problem(
        name,
        task,
        train if loader is None else loader.rows,
        test,
        shown[0] if shown else Presentation(),
        recipe=recipes[0] if recipes else None,
        loader=loader,
    )
