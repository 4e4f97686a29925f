"""Whether `rf.scale_plan` says what a fit takes: real fits at several sizes, with a store, on one thread.

    python -m benchmarks.scale [--sketch sjlt] [--m 1024] [--train 2000 10000 40000] [--widths 1]
    python -m benchmarks.scale --train 5000 --widths 1 2 4
    python -m benchmarks.scale --model transformer --train 100 200 400 [--widths 1]

The model is 784-128w-64w-10 on MNIST, as initialised, for each width w, or two blocks of a transformer of width 64w on
random sequences of 64 tokens out of 256. FLOPs are those that the matrix products of a
fit and a score call really do (`torch.utils.flop_counter`), float32 (gradients, and projections that are products) and
float64 (the curvature) apart. CPU seconds are those of the process without the count of FLOPs, the least of the
repeats. What a job of 32 rows takes beyond its plan (the probe, and what is done once) is added to every prediction.
The rates of the plan are measured at the first size: float64 by a matrix product, the other one such that the first
size takes what it took; what the plan says of the others is a prediction.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import refluence as rf
from refluence.planning import multiply_adds_per_second
from refluence.scale import Device, Layer, Scale, ScalePlan, scale_plan
from refluence.store import describe
from refluence.store.places import open_place
from refluence.zoo import load_dataset

DAMPING = 1.0
FEW = 32
VOCABULARY, TOKENS, BLOCKS = 256, 64, 2
RATES_OF_THEIR_OWN = ("P itself", "curvature", "factorisation", "scores", "errors")
COUNTED = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}


class Flops(TorchDispatchMode):
    """Counts the FLOPs of matrix products by the dtype of their result."""

    def __init__(self) -> None:
        super().__init__()
        self.by_dtype: dict[torch.dtype, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if (count := COUNTED.get(func._overloadpacket)) is not None:
            self.by_dtype[found.dtype] += count(*args, **(kwargs or {}), out_val=found)
        return found


def main() -> None:
    """Run and print one JSON object a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mlp", "transformer"), default="mlp")
    parser.add_argument("--sketch", choices=("sjlt", "gaussian", "kronecker"), default="sjlt")
    parser.add_argument("--m", type=int, default=1024)
    parser.add_argument("--train", type=int, nargs="+", default=[2_000, 10_000, 40_000])
    parser.add_argument("--widths", type=int, nargs="+", default=[1])
    parser.add_argument("--tests", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--store-dtype", choices=("float16", "bfloat16", "float32"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, test = data(options.model, max(options.train))
    device = None
    for width in options.widths:
        for n in options.train:
            scale = asked(options, n, width)
            rows, tests = tuple(x[:n] for x in train), tuple(x[: options.tests] for x in test)
            few = tuple(x[:FEW] for x in rows)
            small = replace(scale, n=FEW, tests=FEW)
            work(small, few, few)  # so that nothing is done for the first time
            first = least(small, few, few, 3) | counted(small, few, few)
            found = least(scale, rows, tests, options.repeats) | counted(scale, rows, tests)
            device = device or calibrated((small, first["cpu seconds"]), (scale, found["cpu seconds"]))
            before, plan = (scale_plan(replace(one, device=device)) for one in (small, scale))
            print(json.dumps({"n": n, "width": width, **compared(before, first, plan, found)}), flush=True)


def asked(options: argparse.Namespace, n: int, width: int) -> Scale:
    """The sizes of a job."""
    side = round(options.m**0.5)
    sketches: dict[str, Any] = {
        "sjlt": lambda: rf.sketches.SJLT(options.m),
        "gaussian": lambda: rf.sketches.Gaussian(options.m),
        "kronecker": lambda: rf.sketches.Kronecker(side, side),
    }
    sequences = options.model == "transformer"
    return Scale(
        n=n,
        layers=transformer(64 * width) if sequences else perceptron(128 * width),
        positions=TOKENS if sequences else 1,
        attention=BLOCKS * 64 * width if sequences else 0,
        tests=options.tests,
        sketch=sketches[options.sketch](),
        dtype=torch.float32,
        store_dtype=getattr(torch, options.store_dtype),
        example_bytes=16 * TOKENS if sequences else 784 * 4 + 8,
        utilisation=1.0,
    )


def data(model: str, n: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(train, test)."""
    if model == "mlp":
        found = load_dataset("mnist", n_train=n, progress=False)
        return tuple((x.flatten(1), y) for x, y in (found.train, found.test))  # type: ignore[return-value]
    tokens = torch.randint(VOCABULARY, (2 * n, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    return (tokens[:n, :-1], tokens[:n, 1:]), (tokens[n:, :-1], tokens[n:, 1:])


def perceptron(width: int) -> tuple[Layer, ...]:
    """784-w-w/2-10."""
    sizes = (784, width, width // 2, 10)
    return tuple(Layer(rows, columns, bias=True) for columns, rows in pairwise(sizes))


def transformer(width: int) -> tuple[Layer, ...]:
    """An embedding, BLOCKS blocks and the matrix of the outputs."""
    block = (Layer(width, width, 4 * BLOCKS), Layer(4 * width, width, BLOCKS), Layer(width, 4 * width, BLOCKS))
    return (Layer(VOCABULARY, width, lookup=True), *block, Layer(VOCABULARY, width))


class Block(nn.Module):
    """Attention of one head and a perceptron, without norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True))
        return x + self.down(nn.functional.gelu(self.up(x)))


def network(scale: Scale) -> nn.Module:
    """The model of these layers."""
    torch.manual_seed(0)
    first = scale.matrices[0]
    if first.lookup:
        width = first.columns
        head = nn.Linear(width, VOCABULARY, bias=False)
        return nn.Sequential(nn.Embedding(VOCABULARY, width), *(Block(width) for _ in range(BLOCKS)), head)
    layers: list[nn.Module] = []
    for one in scale.matrices:
        layers += [nn.Linear(one.columns, one.rows), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def calibrated(*measured: tuple[Scale, float]) -> Device:
    """A device of which the plan says that the second job takes so much longer than the first as it did."""
    double = 2 * multiply_adds_per_second("cpu")
    seconds, flops = [], []
    for scale, took in measured:
        plan = scale_plan(replace(scale, device=Device("one thread", 1.0, double)))
        seconds.append(took - sum(stage.seconds for stage in plan.stages if stage.name in RATES_OF_THEIR_OWN))
        flops.append(sum(stage.flops for stage in plan.stages if stage.name not in RATES_OF_THEIR_OWN))
    return Device("one thread", (flops[1] - flops[0]) / (seconds[1] - seconds[0]), double)


def least(scale: Scale, train: tuple[Tensor, ...], test: tuple[Tensor, ...], repeats: int) -> dict[str, Any]:
    """`work`, the time that took least CPU seconds."""
    return min((work(scale, train, test) for _ in range(repeats)), key=lambda found: float(found["cpu seconds"]))


def work(scale: Scale, train: tuple[Tensor, ...], test: tuple[Tensor, ...]) -> dict[str, Any]:
    """CPU seconds of a fit with a new store and of a score call, and what the store then holds."""
    with tempfile.TemporaryDirectory() as folder:
        influence = rf.Influence(
            rf.Task(network(scale)),
            solver=rf.solvers.Sketched(scale.sketch),
            damping=DAMPING,
            execution=rf.Execution(store=folder, store_dtype=scale.store_dtype),
            progress=False,
        )
        begin = time.process_time()
        influence.fit(train)
        fitted = time.process_time()
        influence.score(test)
        scored = time.process_time()
        [part] = describe(open_place(Path(folder))).parts
    return {
        "cpu seconds": scored - begin,
        "of the fit": fitted - begin,
        "bytes": part.size,
        "shards": part.shards,
        "batch size": influence.plan.workload.batch_size,
    }


def counted(scale: Scale, train: tuple[Tensor, ...], test: tuple[Tensor, ...]) -> dict[str, Any]:
    """FLOPs of the same by dtype."""
    with Flops() as flops:
        work(scale, train, test)
    return {"flops in float32": flops.by_dtype[torch.float32], "flops in float64": flops.by_dtype[torch.float64]}


def products(plan: ScalePlan) -> tuple[float, float]:
    """FLOPs in float32 and float64 of the plan's products of matrices; triangular solves are none that is counted."""
    stages, scale = {stage.name: stage.flops for stage in plan.stages}, plan.scale
    scores = 2.0 * scale.n * scale.sketch.m * scale.tests
    single = sum(stages[name] for name in ("forward", "backward", "attention", "checks"))
    double = stages["curvature"]
    if scale.sketch.m > scale.n:
        double += scores + stages.get("errors", 0.0)
    else:
        single += scores
        double += scores if "errors" in stages else 0.0
    # An SJLT adds to hashed places, and gradients of one position are no products of matrices.
    if not isinstance(scale.sketch, rf.sketches.SJLT):
        single += stages["projection"]
    if scale.positions > 1:
        single += stages["gradients"]
    return single, double


def compared(before: ScalePlan, first: dict[str, Any], plan: ScalePlan, found: dict[str, Any]) -> dict[str, Any]:
    """Predicted, measured and predicted/measured, with what the job of 32 rows took beyond its plan."""
    once = first["flops in float32"] - products(before)[0]
    single, double = products(plan)
    begun = first["cpu seconds"] - before.device_seconds
    pairs = {
        "batch size": (plan.batch_size, found["batch size"]),
        "shards": (plan.store.shards, found["shards"]),
        "bytes": (plan.store.size, found["bytes"]),
        "flops in float32": (once + single, found["flops in float32"]),
        "flops in float64": (double, found["flops in float64"]),
        "cpu seconds": (begun + plan.device_seconds, found["cpu seconds"]),
    }
    return {
        "parameters": plan.scale.parameters,
        **{name: {"predicted": a, "measured": b, "ratio": round(a / b, 4)} for name, (a, b) in pairs.items()},
        "of these beyond the plan": {"flops in float32": once, "cpu seconds": begun},
        "cpu seconds of the fit": found["of the fit"],
        "seconds of each stage": {stage.name: round(stage.seconds, 3) for stage in plan.stages},
        "rates": (plan.scale.on.rate, plan.scale.on.double_rate),
    }


if __name__ == "__main__":
    main()
