"""What a named layer of a model gives for every example of a data set."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refluence.batches import Batch, Batches, Data, rows_of
from refluence.errors import DataError, TaskError
from refluence.isolation import evaluation_mode
from refluence.progress import track
from refluence.task import default_forward

SHOWN = 8


def features(
    model: nn.Module,
    layer: str,
    data: Data,
    batch_size: int | None = None,
    *,
    flatten: bool = True,
    forward: Callable[[nn.Module, Batch], Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Float[Tensor, "n *d"]:
    """The output of a named layer for every example, in eval mode, in the order of the data.

    The model is as before afterwards: training flags, buffers, hooks, random state, where it is.

    Args:
        model: any module.
        layer: a name of `model.named_modules()`; "" is the model's own output.
        data: a `Dataset`, tensor, tuple or mapping of tensors, or an unshuffled `DataLoader`.
        batch_size: examples a forward pass; it changes nothing but time and memory.
        flatten: (n, d) whatever the layer's shape; False: (n, ...) as the layer gives it.
        forward: f(model, batch); None: model(batch[0]), for a mapping model(**batch without "labels").
        device: where the batches go; None: where the model's parameters are.
        progress: whether a long pass shows a bar.

    Raises:
        DataError: an unknown layer, with those of similar names; data that cannot be read in order.
        TaskError: a layer that does not run, runs more than once, or gives no tensor with one row an example.
    """
    module = _named(model, layer)
    run = forward or default_forward
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batches = Batches(data, batch_size, device=device)
    found, seen = [], []
    with evaluation_mode(model), torch.no_grad():
        handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            for _, batch in track(batches, f"features of {layer or 'the model'}", len(batches), progress):
                seen.clear()
                run(model, batch)
                rows = _checked(seen, layer, rows_of(batch)).detach()
                found.append((rows.flatten(1) if flatten and rows.ndim > 1 else rows).cpu().clone())
        finally:
            handle.remove()
    together = torch.cat(found)
    return together[:, None] if flatten and together.ndim == 1 else together


def _named(model: nn.Module, layer: str) -> nn.Module:
    modules = dict(model.named_modules())
    if layer in modules:
        return modules[layer]
    names = [name for name in modules if name]
    close = get_close_matches(layer, names, SHOWN, 0.4) or names[:SHOWN]
    raise DataError(f"{type(model).__name__} has no layer {layer!r}: close to it are {', '.join(close) or 'none'}")


def _checked(seen: list[Any], layer: str, n: int) -> Tensor:
    if len(seen) != 1:
        times = "does not run" if not seen else f"runs {len(seen)} times"
        raise TaskError(f"the layer {layer!r} {times} in a forward pass, and once is needed: name another")
    output = seen[0]
    if not isinstance(output, Tensor) or output.ndim == 0 or output.shape[0] != n:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise TaskError(f"the layer {layer!r} gives {got} for {n} examples: name one with a row for each example")
    return output
