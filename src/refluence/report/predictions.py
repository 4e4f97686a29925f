"""What the model says about rows of the data: label, prediction, probabilities and loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refluence.batches import Batches, tree_map
from refluence.errors import TaskError
from refluence.isolation import evaluation_mode
from refluence.report.formatting import count, number, percent
from refluence.report.presentation import Presentation, Sample, row_of
from refluence.task import IGNORE_INDEX, Batch, Task, batch_targets

MAX_BARS = 5
MAX_VALUES = 4
CHUNK = 256


@dataclass(frozen=True)
class Bar:
    """The probability of one class."""

    name: str
    probability: float
    is_label: bool
    is_prediction: bool


@dataclass(frozen=True)
class Verdict:
    """What the model says about one example.

    `label` and `prediction` are empty and `correct` is None where the task has no such thing: a regression has
    values but no right or wrong, a loss of the user's own may have nothing but its value.
    """

    loss: float
    label: str = ""
    prediction: str = ""
    correct: bool | None = None
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True)
class Example:
    """One row of the data with what the model says about it."""

    row: int
    sample: Sample
    verdict: Verdict


def examine(
    task: Task, data: Any, rows: Iterable[int], presentation: Presentation, name: str = "data"
) -> dict[int, Example]:
    """The given rows of the data, each with its verdict; one forward pass over these rows only."""
    wanted = sorted(set(rows))
    parameter = next(task.model.parameters())
    batches = Batches(data, device=parameter.device, name=name)
    found: dict[int, Example] = {}
    with evaluation_mode(task.model) as model, torch.no_grad():
        for start in range(0, len(wanted), CHUNK):
            chosen = wanted[start : start + CHUNK]
            batch = batches.select(chosen)
            output = task.output(model, batch)
            losses = task.losses(output, batch).double().cpu().tolist()
            verdicts = list(_verdicts(task, output, batch, losses, presentation))
            shown = tree_map(lambda tensor: tensor.detach().cpu(), batch)
            for i, row in enumerate(chosen):
                found[row] = Example(row, row_of(shown, i), verdicts[i])
    return found


def _verdicts(
    task: Task, output: Any, batch: Batch, losses: list[float], presentation: Presentation
) -> Iterator[Verdict]:
    targets = _targets(batch)
    if not isinstance(output, Tensor) or targets is None:
        yield from (Verdict(loss) for loss in losses)
        return
    output, targets = output.detach().double().cpu(), targets.detach().cpu()
    integer = not targets.is_floating_point()
    many = targets.numel() > targets.shape[0]
    if task.loss == "binary_cross_entropy":
        p = output.sigmoid()
        if many:
            yield from _several_labels(p.flatten(1), targets, losses, presentation)
        else:
            yield from _two_classes(p.flatten(), targets, losses, presentation)
    elif integer and task.loss != "mse" and output.ndim == targets.ndim + 1 and output.shape[:-1] == targets.shape:
        if many:
            yield from _sequences(output.flatten(1, -2), targets, losses, presentation)
        else:
            yield from _classes(output.reshape(len(losses), -1), targets, losses, presentation)
    elif targets.numel() == output.numel():
        for loss, target, value in zip(losses, targets, output, strict=True):
            yield Verdict(loss, _values(target), _values(value))
    else:
        yield from (Verdict(loss) for loss in losses)


def _targets(batch: Batch) -> Tensor | None:
    try:
        targets = batch_targets(batch)
    except TaskError:
        return None
    return targets if isinstance(targets, Tensor) and targets.ndim > 0 else None


def _classes(output: Tensor, targets: Tensor, losses: list[float], presentation: Presentation) -> Iterator[Verdict]:
    probabilities = output.softmax(dim=-1)
    top = probabilities.topk(min(MAX_BARS, output.shape[-1]), dim=-1).indices.tolist()
    for i, (loss, target) in enumerate(zip(losses, targets.flatten().tolist(), strict=True)):
        predicted, shown = top[i][0], top[i]
        known = 0 <= target < output.shape[-1]
        if known and target not in shown:
            shown = [*shown[:-1], target]
        bars = tuple(
            Bar(presentation.class_name(c), float(probabilities[i, c]), c == target, c == predicted) for c in shown
        )
        label = presentation.class_name(target) if known else ""
        yield Verdict(loss, label, presentation.class_name(predicted), predicted == target if known else None, bars)


def _two_classes(p: Tensor, targets: Tensor, losses: list[float], presentation: Presentation) -> Iterator[Verdict]:
    for loss, probability, target in zip(losses, p.tolist(), targets.flatten().double().tolist(), strict=True):
        predicted = int(probability >= 0.5)
        hard = target in (0.0, 1.0)
        order = (predicted, 1 - predicted)
        bars = tuple(
            Bar(presentation.class_name(c), probability if c else 1 - probability, c == target, c == predicted)
            for c in order
        )
        label = presentation.class_name(int(target)) if hard else number(target)
        yield Verdict(loss, label, presentation.class_name(predicted), predicted == target if hard else None, bars)


def _several_labels(p: Tensor, targets: Tensor, losses: list[float], presentation: Presentation) -> Iterator[Verdict]:
    for loss, probabilities, target in zip(losses, p, targets.flatten(1).double(), strict=True):
        on, guessed = target >= 0.5, probabilities >= 0.5
        top = probabilities.topk(min(MAX_BARS, len(probabilities)))
        bars = tuple(
            Bar(presentation.class_name(c), float(probabilities[c]), bool(on[c]), bool(guessed[c]))
            for c in top.indices.tolist()
        )
        names = [_names(mask, presentation) for mask in (on, guessed)]
        yield Verdict(loss, names[0], names[1], bool((on == guessed).all()), bars)


def _names(mask: Tensor, presentation: Presentation) -> str:
    chosen = mask.nonzero().flatten().tolist()
    text = ", ".join(presentation.class_name(c) for c in chosen[:MAX_VALUES])
    return (f"{text}, …" if len(chosen) > MAX_VALUES else text) or "none"


def _sequences(output: Tensor, targets: Tensor, losses: list[float], presentation: Presentation) -> Iterator[Verdict]:
    targets = targets.flatten(1)
    counts = targets != IGNORE_INDEX
    hits = ((output.argmax(dim=-1) == targets) & counts).sum(dim=1).tolist()
    chances = output.softmax(dim=-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    means = ((chances * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1)).tolist()
    for loss, hit, mean, total in zip(losses, hits, means, counts.sum(dim=1).tolist(), strict=True):
        right = f"{hit:,} of {count(total, 'target')} right"
        yield Verdict(loss, prediction=f"{right}, mean probability {percent(mean)}")


def _values(tensor: Tensor) -> str:
    values = tensor.double().flatten().tolist()
    return ", ".join(number(v) for v in values[:MAX_VALUES]) + (", …" if len(values) > MAX_VALUES else "")
