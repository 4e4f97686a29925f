"""LDS of factorised sketches beside dattri's LoGra at the same size, on one model and one set of retrained halves.

`python -m benchmarks.factored_lds` (in the environment of `make bench`; without dattri its rows are left out)

Both project the factors of every layer to 32 numbers each, 1,024 a layer. Each has its damping chosen on the same
random tenth of the test rows, LoGra's relative to tr F/d as it defines it, and is reported on the others. LoGra
attributes the loss; ours is shown for the loss too and for the margin, which has the same ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import refluence as rf
from benchmarks.inputs import Inputs
from benchmarks.lds import Table, reported
from refluence import evaluation
from refluence.errors import SketchSizeError
from refluence.evaluation.tuning import tune_damping
from refluence.zoo import load_benchmark

SIDE = 32
SKETCHES = {
    f"Kronecker({SIDE}, {SIDE})": rf.sketches.Kronecker(SIDE, SIDE),
    f"TensorSketch({SIDE**2})": rf.sketches.TensorSketch(SIDE**2),
    f"SJLT({SIDE**2})": rf.sketches.SJLT(SIDE**2),
}
DAMPINGS = (1e-7, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
RELATIVE = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""LoGra's dampings; its default is 1e-5."""


def ours(
    solver: rf.solvers.Solver, curvature: str, task: rf.Task, train: Any, test: Any, truth: evaluation.GroundTruth
) -> dict[str, Any]:
    """One of our sketches with the damping that is best on the held-out tenth."""
    influence = rf.Influence(task, curvature, solver, DAMPINGS[-1], blocks="module").fit(train)
    tuned = tune_damping(influence, test, truth, [damping for damping in DAMPINGS if possible(influence, damping)])
    found = reported(tuned.scores, truth, tuned.reported_rows)
    return found | {"damping": tuned.damping, "at_edge": tuned.at_edge, "chosen_rows": tuned.chosen_rows}


def possible(influence: rf.Influence, damping: float) -> bool:
    """Whether the sketch is large enough for it."""
    try:
        return influence.at(damping).effective_dimension > 0
    except SketchSizeError:
        return False


def logra(dampings: Sequence[float], given: Inputs, truth: evaluation.GroundTruth, chosen: list[int]) -> dict[str, Any]:
    """LoGra with the best of its dampings on the held-out tenth."""
    from benchmarks.protocol import Measurement
    from benchmarks.workers.dattri_logra import scores

    found: dict[float, Tensor] = {}
    for relative in dampings:
        options = {"size": SIDE**2, "batch": 5000, "relative": relative}
        with tempfile.TemporaryDirectory() as folder:
            found[relative] = scores(given, options, Measurement(), folder)
    best = max(found, key=lambda r: evaluation.lds(found[r][chosen], truth.tests(chosen), resamples=2).value)
    rest = sorted(set(range(truth.n_test)) - set(chosen))
    return reported(found[best][rest], truth, rest) | {"damping": best, "at_edge": best in (dampings[0], dampings[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/factored-lds"))
    arguments = parser.parse_args()
    benchmark = load_benchmark("mnist", "mlp")
    train, test = benchmark.train, benchmark.test
    folder = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    truth = evaluation.retrain(benchmark.task, train, test, arguments.subsets, benchmark.recipe, path=folder / "halves")
    print(f"{benchmark.description}\n{truth.n_subsets} random halves, {truth.n_test} test rows\n")
    print("| method | λ | LDS | 95 % interval | seeds averaged | s |\n| --- | --- | --- | --- | --- | --- |")
    table = Table(folder / "factored.json")
    margin = dataclasses.replace(benchmark.task, measurement="margin")
    for kind, sketch in SKETCHES.items():
        for curvature, measured, task in (
            ("fisher", "loss", benchmark.task),
            ("fisher", "margin", margin),
            ("ggn", "margin", margin),
        ):
            for replicates in (1, 4):
                times = "" if replicates == 1 else f", mean of {replicates}"
                solver = rf.solvers.Sketched(sketch, replicates=replicates)
                table.add(
                    f"{kind}{times}, {curvature}, {measured}",
                    lambda solver=solver, curvature=curvature, task=task: ours(
                        solver, curvature, task, train, test, truth
                    ),
                )
    if importlib.util.find_spec("dattri") is None:
        print("dattri is not installed: LoGra is left out")
        return
    chosen = next(row["chosen_rows"] for row in table.rows.values() if "chosen_rows" in row)
    given = Inputs(benchmark.task.model, train, test)
    for name, dampings in (("default damping", (1e-5,)), ("damping chosen as ours", RELATIVE)):
        table.add(f"dattri LoGra, {name}", lambda dampings=dampings: logra(dampings, given, truth, chosen))


if __name__ == "__main__":
    main()
