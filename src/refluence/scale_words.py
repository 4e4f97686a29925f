"""A plan of scale in words: what is assumed, and what follows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from refluence.execution import format_bytes
from refluence.scale_sizes import ASPECT, Scale
from refluence.scale_sketching import DRAWN, HASHED, HASHED_BYTES, ORTHOGONAL, numbers_made
from refluence.sketches import SJLT, Kronecker, TensorSketch
from refluence.sketches.factored import FactoredSketch
from refluence.sketches.memory import sketch_cache_bytes
from refluence.solvers.sketch_errors import has_error_formula

if TYPE_CHECKING:
    from refluence.scale import ScalePlan


def assumptions(scale: Scale, batch_size: int, checked: float, in_flight: float) -> list[str]:
    """What the numbers of a plan stand on.

    Args:
        batch_size: examples of a forward pass.
        checked: the share of examples whose gradients are made twice.
        in_flight: memory of a batch in work over that of the gradients kept of it.
    """
    device, sketch = scale.on, scale.sketch
    d = scale.parameters
    said = [_layers(scale)]
    said.append(
        "FLOPs are two for a multiply-add. With p = Σ positions × rows × columns of the matrices, a forward pass is 2p "
        "an example, the backward pass to the layers' outputs 2p more"
        + ("" if scale.layers is None else " less the first layer's")
        + ", and the gradients 2p where they are formed; attention multiplies all pairs of positions; norms, "
        "activations and rows of embeddings are left out"
    )
    said.append(
        f"{checked:.2%} of the examples, {batch_size:,} to a batch, are passed a second time, one at a time, to check "
        "their gradients, one of which is whole in memory, as with the built-in cross entropy"
    )
    if isinstance(sketch, FactoredSketch):
        said.append(
            f"{sketch!r} takes a layer's factors, so that its gradient is never formed, where "
            "positions × (rows + columns) is below rows × columns"
        )
    else:
        said.append(
            f"{sketch!r} takes every gradient formed, {d:,.0f} numbers, some columns at a time; its time is that of "
            "its arithmetic or of moving those numbers three times, whichever is longer"
        )
    if not isinstance(sketch, TensorSketch):
        said.append(_made(scale, batch_size))
    matrices = "one matrix" if scale.block_count == 1 else f"{scale.block_count:,} matrices"
    said.append(
        f"P C Pᵀ is added up and factorised in float64, {matrices} of "
        f"{scale.side:,} × {scale.side:,}, with the eigenvalues that a damping by rule needs"
    )
    said.append(
        f"{device.name}: {device.rate:.3g} FLOP/s in the gradients' dtype ({_short(scale.dtype)}) and "
        f"{device.double_rate:.3g} in float64 and for scores, of which {scale.utilisation:.0%} are reached"
    )
    said.append(
        f"a batch in work takes {in_flight:g} times the memory of the gradients kept of it: activations, output "
        "gradients and copies; an input that matrices share counts for each"
    )
    if device.memory is not None:
        said.append(
            f"a worker has as many devices as its memory needs, of {format_bytes(device.memory)} each, and they share "
            "its work without loss; the model's own code spreads it over them"
        )
    said.append(
        "workers take whole shards, all at the same rate; reading data, writing the store and summing curvatures go on "
        "beside the arithmetic; no worker is lost"
    )
    said.append(
        'projected rows are read back from the store or lie in mapped files (offload="disk"); squared norms, which a '
        "relative damping stores too (24 bytes a row), are not counted"
    )
    if scale.errors:
        said.append(
            "scores come with standard errors"
            if has_error_formula(sketch)
            else f"scores of one {type(sketch).__name__} sketch come without standard errors, which need replicates: "
            "each costs as much as the whole"
        )
    return said


def _made(scale: Scale, batch_size: int) -> str:
    again = numbers_made(scale, batch_size, 1) > numbers_made(replace(scale, n=1, tests=1), 2, 1)
    if isinstance(scale.sketch, SJLT):
        how = f"hashed on the device, {HASHED_BYTES} bytes moved a column (a core hashes {HASHED:.3g} columns a second)"
    else:
        rate = ORTHOGONAL if isinstance(scale.sketch, Kronecker) else DRAWN
        how = f"drawn by a core of the host, {rate:.3g} numbers a second, for which the worker's devices wait"
    kept = format_bytes(sketch_cache_bytes(scale.sketch, int(scale.parameters)))
    often = f"more than the {kept} that are kept, and so again for every batch" if again else "once for each worker"
    return f"P is {how}: {often}"


def _layers(scale: Scale) -> str:
    if scale.layers is not None:
        count = sum(one.count for one in scale.matrices)
        return f"{scale.parameters:,.0f} parameters in {count:,.0f} weight matrices, as given"
    first = scale.matrices[0]
    return (
        f"{scale.parameters:,.0f} parameters are those of a transformer of {first.count / 4:,.0f} blocks of width "
        f"{first.rows:,} ({ASPECT} times their number, as of GPT-3), each with four matrices of w × w, one "
        f"of w × 4w and one of 4w × w, used at all of the {scale.positions:,} positions of an example"
    )


def facts(plan: ScalePlan) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """(section, its (what, how much, time or remark))."""
    scale, device = plan.scale, plan.scale.on
    done = [
        (stage.name, format_flops(stage.flops) if stage.flops else "", format_hours(stage.seconds / 3600))
        for stage in plan.stages
        if stage.seconds
    ]
    together = f"{scale.workers:,} × {plan.devices_per_worker:,} devices"
    done += [
        ("device hours", format_flops(plan.flops), format_hours(plan.device_hours)),
        ("wall time", together, format_hours(plan.wall_hours)),
    ]
    store = plan.store
    rate = store.size / scale.workers / max(plan.wall_seconds, 1e-9)
    stored = [
        ("store", format_bytes(store.size), f"{store.shards:,} shards of {store.rows:,} rows"),
        ("of it projected rows", format_bytes(store.numbers), f"{store.numbers / scale.n:,.0f} bytes each"),
        ("checksums", format_bytes(store.checksums), ""),
        ("names and attributes", format_bytes(store.overhead), "to 10 %"),
        ("written by a worker", f"{format_bytes(rate)}/s", ""),
    ]
    held = [(name, format_bytes(count), "") for name, count in plan.memory.items()]
    held += [
        ("at once", format_bytes(plan.peak_memory), f"{plan.devices_per_worker:,} × {device.name}"),
        ("projected rows beside", format_bytes(plan.held), "in mapped files"),
    ]
    moved = [(name, format_bytes(count), "") for name, count in plan.traffic.items()]
    return [("work", done), ("store", stored), ("memory of a worker", held), ("traffic", moved)]


def lines(plan: ScalePlan) -> list[str]:
    """The plan for people, assumptions last."""
    found = [headline(plan)]
    for section, rows in facts(plan):
        found.append(f"{section}:")
        found += [f"  {what:<44} {much:>16}   {more}".rstrip() for what, much, more in rows]
    return [*found, "assumed:", *(f"  - {one}" for one in plan.assumptions)]


def headline(plan: ScalePlan) -> str:
    """The sizes in a line."""
    scale = plan.scale
    return (
        f"{scale.n:,} train and {scale.tests:,} test examples of {scale.positions:,} positions, "
        f"{scale.parameters:,.0f} parameters, {scale.sketch!r}"
        + (f" for each of {scale.block_count:,} blocks" if scale.block_count > 1 else "")
    )


def format_flops(flops: float) -> str:
    """A number of FLOPs for people."""
    for size, unit in ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if flops >= size:
            return f"{flops / size:,.1f} {unit}"
    return f"{flops:,.0f} FLOP"


def format_hours(hours: float) -> str:
    """Hours, or less, for people."""
    if hours >= 1:
        return f"{hours:,.0f} h" if hours >= 10 else f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
