"""Run the benchmark: `python -m benchmarks.run [--only gram,sketch] [--quick]`; `make bench` runs all of it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from benchmarks.case import FULL, QUICK, Case, Size
from benchmarks.cases import ITEMS, cases

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "benchmarks.md"
DAMPING = 1e-2


def main() -> int:
    """Measure, save everything found as JSON, write the report; the exit status says whether the inputs were there."""
    options = _options()
    folder = ROOT / "runs" / ("bench-quick" if options.quick else "bench")
    chosen = options.only.split(",") if options.only else list(ITEMS)
    unknown = sorted(set(chosen) - set(ITEMS))
    if unknown:
        sys.exit(f"--only knows {', '.join(ITEMS)}; not {', '.join(unknown)}")
    full = chosen == list(ITEMS) and not options.quick and options.damping == DAMPING
    document = options.out or (DOCUMENT if full else folder / "benchmarks.md")
    if options.again:
        found = measure_again(folder, options.again.split(","))
        (folder / "results.json").write_text(json.dumps(found, indent=1))
    elif not options.render:
        size = QUICK if options.quick else FULL
        found = measure(folder, size, chosen, options.damping, options.repetitions)
        (folder / "results.json").write_text(json.dumps(found, indent=1))
    found = json.loads((folder / "results.json").read_text())
    document.parent.mkdir(parents=True, exist_ok=True)
    text = report.render(found)
    document.write_text(text)
    print(text)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--only", help=f"some of {','.join(ITEMS)}; the report then goes to runs/bench/")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether everything runs, not how fast")
    parser.add_argument("--damping", type=float, default=DAMPING, help="λ of every method (default %(default)g)")
    parser.add_argument("--repetitions", type=int, help="at most so many of each case")
    parser.add_argument("--render", action="store_true", help="write the report again from the last results")
    parser.add_argument("--again", help="measure these cases again, and keep the last run's results of the others")
    parser.add_argument("--out", type=Path, help="write the report there")
    return parser.parse_args()


def measure(folder: Path, size: Size, chosen: list[str], damping: float, repetitions: int | None) -> dict[str, Any]:
    """All results as plain data; the repetitions of the cases are interleaved, so that all meet the same machine."""
    for name in ("inputs", "scores", "results", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    described = machine.describe()
    setup = _run(folder, "inputs", "benchmarks.workers.prepare", {"n_train": size.n_train, "n_test": size.n_test}, 600)
    if "error" in setup:
        sys.exit(
            f"the benchmark's inputs could not be made: {setup['error']}\nset REFLUENCE_DATA to a folder with mnist/"
        )
    rates = _run(folder, "rates", "benchmarks.workers.rates", {"size": size.matrix, "numbers": size.numbers}, 120)
    paths = {name: str(_scores(folder, f"reference-{name}")) for name in ("fisher", "ggn", "unsure")}
    reference = _run(folder, "reference", "benchmarks.workers.reference", {"damping": damping, "scores": paths}, 900)
    print(f"{'reference':>28}  {reference.get('error') or reference['facts']}", flush=True)
    table = [case for case in cases(size, damping) if case.item in chosen]
    runs: dict[str, list[dict[str, Any]]] = {case.name: [] for case in table}
    rounds = max(min(case.repetitions, repetitions or case.repetitions) for case in table)
    for repetition in range(rounds):
        for case in table:
            failed = any("error" in run for run in runs[case.name])
            if repetition < case.repetitions and not failed:
                runs[case.name].append(_measure(folder, case))
    compared = {} if "error" in reference else _compare(folder, table, runs, paths)
    return {
        "machine": described,
        "versions": machine.versions(),
        "size": vars(size),
        "damping": damping,
        "inputs": setup["facts"],
        "rates": rates,
        "reference": reference,
        "cases": [vars(case) | {"runs": runs[case.name]} for case in table],
        "compared": compared,
        "minutes": (time.perf_counter() - start) / 60,
    }


def measure_again(folder: Path, names: list[str]) -> dict[str, Any]:
    """The last run's results, with those of some cases replaced."""
    found = json.loads((folder / "results.json").read_text())
    size, damping = Size(**found["size"]), found["damping"]
    table = {case.name: case for case in cases(size, damping)}
    if unknown := set(names) - set(table):
        sys.exit(f"--again knows {', '.join(table)}; not {', '.join(sorted(unknown))}")
    known = {case["name"]: case["runs"] for case in found["cases"]}
    for name in names:
        known[name] = [_measure(folder, table[name])]
    present = [case for case in table.values() if case.name in known]
    paths = {name: str(_scores(folder, f"reference-{name}")) for name in ("fisher", "ggn", "unsure")}
    found["compared"] = _compare(folder, present, known, paths)
    found["cases"] = [vars(case) | {"runs": known[case.name]} for case in present]
    found["again"] = sorted(set(found.get("again", [])) | set(names))
    return found


def _measure(folder: Path, case: Case) -> dict[str, Any]:
    result = _run(folder, case.name, case.worker, case.options, case.timeout)
    outcome = result.get("error") or ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result["stages"].items())
    print(f"{case.name:>28}  {outcome}  (peak {result.get('peak_mb', 0):.0f} MB)", flush=True)
    return result


def _run(folder: Path, name: str, worker: str, options: dict[str, Any], timeout: float) -> dict[str, Any]:
    """One worker in a process of its own; its result, or {"error": what happened}."""
    result = folder / "results" / f"{name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", worker, "--inputs", folder / "inputs", "--scores", _scores(folder, name)]
    command += ["--result", result, "--options", json.dumps(options)]
    log = folder / "logs" / f"{name}.txt"
    with log.open("w") as output:
        try:
            ended = subprocess.run(
                [str(part) for part in command],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"given up after {timeout:.0f} s"}
    if result.exists():
        return json.loads(result.read_text())
    if ended.returncode < 0:
        return {"error": f"killed by signal {-ended.returncode}, as when memory runs out"}
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    return {"error": f"did not start: {lines[-1][:300] if lines else f'exit status {ended.returncode}'}"}


def _scores(folder: Path, name: str) -> Path:
    return folder / "scores" / f"{name}.npy"


def _compare(
    folder: Path, table: list[Case], runs: dict[str, list[dict[str, Any]]], references: dict[str, str]
) -> dict[str, Any]:
    others = {
        case.name: (str(_scores(folder, case.name)), case.reference)
        for case in table
        if case.scores != "none" and runs[case.name] and "error" not in runs[case.name][-1]
    }
    options = {"references": references, "others": others}
    return _run(folder, "compare", "benchmarks.workers.compare", options, 300).get("facts", {})


if __name__ == "__main__":
    sys.exit(main())
