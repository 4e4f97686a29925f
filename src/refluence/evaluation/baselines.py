"""What a method must beat: scores that need no curvature, or no model at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from refluence.batches import Batches, Data, rows_of
from refluence.errors import DataError, TaskError
from refluence.influence import Influence
from refluence.isolation import evaluation_mode
from refluence.scores import Scores
from refluence.solvers import Identity
from refluence.task import Task
from refluence.training import stream


def random_scores(n_test: int, n_train: int, *, seed: int = 0) -> Scores:
    """Independent standard normal scores: what chance gives."""
    generator = np.random.default_rng(stream(seed, "random scores"))
    values = torch.from_numpy(generator.standard_normal((n_test, n_train)))
    return Scores(values, n_train, manifest={"baseline": "random", "seed": seed})


def loss_scores(task: Task, train: Data, test: Data) -> Scores:
    """The training loss of each train example, the same for every test example."""
    losses = train_losses(task, train)
    n_test = Batches(test, name="test data").n
    return Scores(losses.repeat(n_test, 1), len(losses), manifest={"baseline": "loss"})


def train_losses(task: Task, train: Data) -> Float[Tensor, " n"]:
    """The training loss of each train example."""
    parts = []
    with evaluation_mode(task.model), torch.no_grad():
        for _, batch in Batches(train, device=_device(task.model), name="train data"):
            parts.append(task.losses(task.output(task.model, batch), batch).detach().cpu())
    return torch.cat(parts)


def gradient_dot(task: Task, train: Data, test: Data, *, progress: bool = True) -> Scores:
    """g_test · g_train, influence with the identity for the inverse curvature (Charpiat et al. 2019)."""
    return Influence(task, solver=Identity(), progress=progress).fit(train).score(test)


def gradient_cosine(task: Task, train: Data, test: Data, *, progress: bool = True) -> Scores:
    """cos(g_test, g_train); 0 where a gradient is 0 (Hanawa et al. 2021)."""
    influence = Influence(task, solver=Identity(), progress=progress).fit(train)
    scores = influence.score(test, normalize="l-relatif")
    squared = torch.zeros(scores.shape[0], dtype=torch.float64)
    for start, blocks in influence._test_rows(test):
        for block in blocks.values():
            squared[start : start + block.n] += block.squared_norms().cpu()
    norms = torch.where(squared > 0, squared.sqrt(), torch.inf).to(scores.values)
    manifest = {**scores.manifest, "baseline": "gradient cosine"}
    return Scores(scores.values / norms[:, None], scores.n_train, manifest=manifest)


def embedding_neighbours(
    task: Task,
    train: Data,
    test: Data,
    *,
    layer: str | None = None,
    measure: str = "cosine",
) -> Scores:
    """Nearness of the model's activations: their cosine, or minus their Euclidean distance.

    Args:
        task: whose model is run, in eval mode.
        train, test: the data.
        layer: the module whose output is compared; None: the input of the `nn.Linear` that runs last, the usual
            embedding. Activations of more than two dimensions (n, t, d) are averaged over t, longer ones flattened.
        measure: "cosine" or "distance".

    Raises:
        TaskError: no such layer, or none that runs last.
        DataError: another measure.
    """
    if measure not in ("cosine", "distance"):
        raise DataError(f'measure must be "cosine" or "distance", not {measure!r}')
    a, b = (_activations(task, data, layer, name) for data, name in ((test, "test data"), (train, "train data")))
    if measure == "cosine":
        values = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    else:
        values = -torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    manifest = {"baseline": "embedding neighbours", "layer": layer, "measure": measure}
    return Scores(values, len(b), manifest=manifest)


def baseline_scores(task: Task, train: Data, test: Data, *, seed: int = 0, progress: bool = True) -> dict[str, Scores]:
    """Every baseline by name: random, loss, gradient dot, gradient cosine, embedding cosine.

    The last is left out for a model without `nn.Linear`.
    """
    loss = loss_scores(task, train, test)
    found = {
        "random": random_scores(*loss.shape, seed=seed),
        "loss": loss,
        "gradient dot": gradient_dot(task, train, test, progress=progress),
        "gradient cosine": gradient_cosine(task, train, test, progress=progress),
    }
    if any(isinstance(module, nn.Linear) for module in task.model.modules()):
        found["embedding cosine"] = embedding_neighbours(task, train, test)
    return found


def _activations(task: Task, data: Data, layer: str | None, name: str) -> Float[Tensor, "n d"]:
    model = task.model
    modules = dict(model.named_modules())
    if layer is not None and layer not in modules:
        raise TaskError(f"the model has no layer {layer!r}: use one of {', '.join(key for key in modules if key)}")
    seen: dict[str, Tensor] = {}

    def into(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen["activation"] = inputs[0]

    def out_of(module: nn.Module, inputs: Any, output: Any) -> None:
        seen["activation"] = output

    if layer is None:
        hooks = [m.register_forward_pre_hook(into) for m in modules.values() if isinstance(m, nn.Linear)]
    else:
        hooks = [modules[layer].register_forward_hook(out_of)]
    parts = []
    try:
        with evaluation_mode(model), torch.no_grad():
            for _, batch in Batches(data, device=_device(model), name=name):
                seen.clear()
                task.output(model, batch)
                parts.append(_rows(seen.get("activation"), rows_of(batch), layer))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(parts)


def _rows(activation: Any, n: int, layer: str | None) -> Float[Tensor, "n d"]:
    what = f"layer {layer!r}" if layer is not None else "the last nn.Linear"
    if not isinstance(activation, Tensor):
        raise TaskError(f"{what} did not run or gave no tensor: name another `layer`")
    if activation.ndim < 2 or activation.shape[0] != n:
        raise TaskError(
            f"{what} has activations of shape {tuple(activation.shape)} for {n} examples: name a `layer` whose first "
            "dimension is the examples"
        )
    if activation.ndim == 3:
        activation = activation.mean(dim=1)
    return activation.detach().flatten(1).cpu().double()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
