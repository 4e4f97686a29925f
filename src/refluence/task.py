"""What is differentiated: the model, its loss, what the test scores explain, and which parameters."""

from __future__ import annotations

import fnmatch
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from refluence.errors import TaskError

IGNORE_INDEX = -100

Batch = Any
PerExample = Callable[[Any, Batch], Float[Tensor, " n"]]
ParameterChoice = str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None


def batch_inputs(batch: Batch) -> Any:
    """What the default `forward` gives the model: `batch[0]`, or a mapping's entries without "labels"."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}
    if isinstance(batch, Tensor):
        return batch
    return batch[0]


def batch_targets(batch: Batch) -> Any:
    """The targets that the built-in losses read: `batch["labels"]` of a mapping, else `batch[1]`."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise TaskError(
                f'the built-in losses read the targets from batch["labels"], but the batch has the keys {list(batch)}: '
                "add that key, or give `loss` as a function of (output, batch)"
            )
        return batch["labels"]
    if isinstance(batch, Tensor) or len(batch) < 2:
        raise TaskError(
            "the built-in losses read the targets from batch[1], but the batch has one element: "
            "give the targets as the second element, or `loss` as a function of (output, batch)"
        )
    return batch[1]


def default_forward(model: nn.Module, batch: Batch) -> Any:
    """`model(batch[0])`, or `model(**batch without "labels")` for a mapping; its `.logits` where it has them."""
    inputs = batch_inputs(batch)
    if isinstance(inputs, Mapping):
        _check_keywords(model, inputs)
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return getattr(output, "logits", output)


def _check_keywords(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    try:
        inspect.signature(model.forward).bind(**inputs)
    except TypeError as error:
        raise TaskError(
            f'every key of a batch but "labels" goes to the model, and {type(model).__name__}.forward cannot be called '
            f'with {list(inputs)}: {error}. Name the targets "labels", or give `forward` as f(model, batch) -> output'
        ) from None


def _mean_per_example(values: Tensor) -> Float[Tensor, " n"]:
    return values.reshape(values.shape[0], -1).mean(dim=1)


def _classes_last(output: Any, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (n, t, c), targets (n, t) with ignored ones set to 0, and the mask (n, t) of the targets that count."""
    if not isinstance(output, Tensor) or output.ndim < 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TaskError(
            f'loss "cross_entropy" needs an output of logits (n, ..., classes); the model gave {shape}: '
            "give `forward` to select the logits, or `loss` as a function"
        )
    if targets.is_floating_point() or targets.shape != output.shape[:-1]:
        raise TaskError(
            f'loss "cross_entropy" needs integer targets of shape {tuple(output.shape[:-1])} for logits of shape '
            f"{tuple(output.shape)} (class last); the targets are {targets.dtype} of shape {tuple(targets.shape)}"
        )
    n, c = output.shape[0], output.shape[-1]
    flat = targets.reshape(n, -1)
    counts = flat != IGNORE_INDEX
    return output.reshape(n, -1, c), torch.where(counts, flat, 0), counts


def _mean_of_counting(values: Float[Tensor, "n t"], counts: Tensor) -> Float[Tensor, " n"]:
    return torch.where(counts, values, 0).sum(dim=1) / counts.sum(dim=1).clamp(min=1)


def cross_entropy(output: Any, batch: Batch) -> Float[Tensor, " n"]:
    """−log p(target), mean over an example's targets that are not −100; class last for more than two dimensions."""
    logits, targets, counts = _classes_last(output, batch_targets(batch))
    return _mean_of_counting(-F.log_softmax(logits, dim=-1).gather(-1, targets[..., None])[..., 0], counts)


def classification_margin(output: Any, batch: Batch) -> Float[Tensor, " n"]:
    """−log p/(1−p) of the target class (TRAK's margin, negated), mean over an example's targets."""
    logits, targets, counts = _classes_last(output, batch_targets(batch))
    target = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, targets[..., None], True)
    others = torch.logsumexp(logits.masked_fill(target, -torch.inf), dim=-1)
    return _mean_of_counting(others - logits.gather(-1, targets[..., None])[..., 0], counts)


def classification_logit(output: Any, batch: Batch) -> Float[Tensor, " n"]:
    """−logit of the target class, mean over an example's targets."""
    logits, targets, counts = _classes_last(output, batch_targets(batch))
    return _mean_of_counting(-logits.gather(-1, targets[..., None])[..., 0], counts)


def classification_error(output: Any, batch: Batch) -> Float[Tensor, " n"]:
    """1 where another class than the target has the highest logit, mean over an example's targets."""
    logits, targets, counts = _classes_last(output, batch_targets(batch))
    return _mean_of_counting((logits.argmax(dim=-1) != targets).to(logits.dtype), counts)


def _like_output(output: Any, batch: Batch, loss: str) -> Tensor:
    targets = batch_targets(batch)
    if not isinstance(output, Tensor) or targets.numel() != output.numel() or targets.shape[0] != output.shape[0]:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TaskError(
            f'loss "{loss}" needs as many targets as outputs; outputs {shape}, targets {tuple(targets.shape)}: '
            "reshape the targets, or give `loss` as a function"
        )
    return targets.reshape(output.shape).to(output.dtype)


def mse(output: Any, batch: Batch) -> Float[Tensor, " n"]:
    """(output − target)², mean over an example's outputs."""
    return _mean_per_example((output - _like_output(output, batch, "mse")) ** 2)


def binary_cross_entropy(output: Any, batch: Batch) -> Float[Tensor, " n"]:
    """−log p(target) with p = sigmoid(output), mean over an example's outputs."""
    targets = _like_output(output, batch, "binary_cross_entropy")
    return _mean_per_example(F.binary_cross_entropy_with_logits(output, targets, reduction="none"))


def binary_logit(output: Any, batch: Batch) -> Float[Tensor, " n"]:
    """∓logit: log((1−p)/p) of the target, which for two classes is both the margin and the logit, negated."""
    targets = _like_output(output, batch, "binary_cross_entropy")
    return _mean_per_example((1 - 2 * targets) * output)


def binary_error(output: Any, batch: Batch) -> Float[Tensor, " n"]:
    """1 where sigmoid(output) is on the other side of ½ than the target, mean over an example's outputs."""
    targets = _like_output(output, batch, "binary_cross_entropy")
    return _mean_per_example(((output > 0) != (targets > 0.5)).to(output.dtype))


LOSSES: dict[str, PerExample] = {
    "cross_entropy": cross_entropy,
    "mse": mse,
    "binary_cross_entropy": binary_cross_entropy,
}
MEASUREMENTS: dict[tuple[str, str], PerExample] = {
    ("cross_entropy", "margin"): classification_margin,
    ("cross_entropy", "logit"): classification_logit,
    ("binary_cross_entropy", "margin"): binary_logit,
    ("binary_cross_entropy", "logit"): binary_logit,
}
ERRORS: dict[str, PerExample] = {
    "cross_entropy": classification_error,
    "binary_cross_entropy": binary_error,
}
"""Whether a prediction is wrong: no measurement to explain, because it has no gradient, but one to take."""


def _checked(function: PerExample, name: str) -> PerExample:
    """`function`, with an error where it does not give one value an example."""

    def values(output: Any, batch: Batch) -> Float[Tensor, " n"]:
        result = function(output, batch)
        if not isinstance(result, Tensor) or result.ndim != 1:
            got = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise TaskError(
                f"`{name}` must return one value per example, a tensor of shape (batch,); it returned {got}. "
                'A loss with reduction="mean" or "sum" mixes the examples: use reduction="none" and average over '
                "an example's own outputs only"
            )
        return result

    return values


REPLICATING = (nn.parallel.DistributedDataParallel, nn.DataParallel)
"""What makes copies of a module for training; its gradients are the module's."""


@dataclass(frozen=True)
class Task:
    """What is differentiated.

    Args:
        model: any `nn.Module`. It is never changed. Of `DistributedDataParallel` and `DataParallel` the module inside.
        loss: "cross_entropy", "mse", "binary_cross_entropy", or `f(output, batch) -> (batch,)` per-example losses.
        forward: `f(model, batch) -> output`; default `model(batch[0])`, for a dict `model(**batch without "labels")`,
            its `.logits` where it has them.
        measurement: what the test scores explain: None (the loss), "margin" (log p/(1−p)), "logit", or
            `f(output, batch) -> (batch,)`, lower is better like a loss; "margin" and "logit" are negated inside.
        parameters: None (all that require grad), a name or glob, several of them, or `f(name, parameter) -> bool`.
        l2: weight decay (l2/2)·‖θ‖² of the training objective, which is mean loss + (l2/2)·‖θ‖².

    Raises:
        TaskError: an unknown loss, measurement or parameter name; a negative l2.
    """

    model: nn.Module
    loss: str | PerExample = "cross_entropy"
    forward: Callable[[nn.Module, Batch], Any] | None = None
    measurement: str | PerExample | None = None
    parameters: ParameterChoice = None
    l2: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TaskError(f"`model` must be a torch.nn.Module, not {type(self.model).__name__}")
        if isinstance(self.model, REPLICATING):
            object.__setattr__(self, "model", self.model.module)
        if not callable(self.loss) and self.loss not in LOSSES:
            raise TaskError(f"unknown loss {self.loss!r}: use one of {sorted(LOSSES)} or f(output, batch) -> (batch,)")
        if not (self.l2 >= 0):
            raise TaskError(f"l2 must be a number ≥ 0, not {self.l2!r}")
        if self.parameters is not None and not callable(self.parameters) and not isinstance(self.parameters, str):
            object.__setattr__(self, "parameters", tuple(self.parameters))
        self._measurement_function()
        self.parameter_names()

    def output(self, model: nn.Module, batch: Batch) -> Any:
        """The output of `model` (this task's, or a copy of it) on a batch."""
        return (self.forward or default_forward)(model, batch)

    def losses(self, output: Any, batch: Batch) -> Float[Tensor, " n"]:
        """Per-example training losses."""
        return _checked(self.loss if callable(self.loss) else LOSSES[self.loss], "loss")(output, batch)

    def measurements(self, output: Any, batch: Batch) -> Float[Tensor, " n"]:
        """Per-example values that the test scores explain, lower is better."""
        return _checked(self._measurement_function(), "measurement")(output, batch)

    def _measurement_function(self) -> PerExample:
        if callable(self.measurement):
            return self.measurement
        if self.measurement in (None, "loss"):
            return self.loss if callable(self.loss) else LOSSES[self.loss]
        key = (self.loss if isinstance(self.loss, str) else "custom", self.measurement)
        if key not in MEASUREMENTS:
            raise TaskError(
                f"measurement {self.measurement!r} is not defined for loss {self.loss!r}: use None (the loss), "
                '"margin" or "logit" with "cross_entropy" or "binary_cross_entropy", or f(output, batch) -> (batch,)'
            )
        return MEASUREMENTS[key]

    def parameter_names(self) -> tuple[str, ...]:
        """The names of the attributed parameters, in the model's order; a tied weight appears once.

        Raises:
            TaskError: a name or glob that matches nothing, or a choice that leaves nothing.
        """
        named = dict(self.model.named_parameters())
        if not named:
            raise TaskError(f"the model ({type(self.model).__name__}) has no parameters to attribute")
        choice = self.parameters
        if choice is None:
            chosen = {name for name, parameter in named.items() if parameter.requires_grad}
        elif callable(choice):
            chosen = {name for name, parameter in named.items() if choice(name, parameter)}
        else:
            chosen = self._matching((choice,) if isinstance(choice, str) else tuple(choice), named)
        if not chosen:
            raise TaskError(
                "no parameter is left to attribute: `parameters` selects none"
                if choice is not None
                else "no parameter requires grad: unfreeze some, or name them in `parameters`"
            )
        return tuple(name for name in named if name in chosen)

    def _matching(self, patterns: tuple[str, ...], named: Mapping[str, nn.Parameter]) -> set[str]:
        canonical = {id(parameter): name for name, parameter in named.items()}
        aliases = dict(self.model.named_parameters(remove_duplicate=False))
        chosen: set[str] = set()
        for pattern in patterns:
            found = {canonical[id(aliases[name])] for name in fnmatch.filter(aliases, pattern)}
            if not found:
                raise TaskError(f"no parameter matches {pattern!r}; the model has {', '.join(aliases)}")
            chosen |= found
        return chosen

    def describe(self) -> dict[str, Any]:
        """Names of the loss, measurement and parameters, for manifests and fingerprints."""
        return {
            "model": type(self.model).__name__,
            "loss": _name(self.loss),
            "forward": _name(self.forward or default_forward),
            "measurement": _name(self.measurement or "loss"),
            "parameters": list(self.parameter_names()),
            "l2": float(self.l2),
        }


def _name(thing: Any) -> str:
    if isinstance(thing, str):
        return thing
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    try:
        return f"{name}:{hash_text(inspect.getsource(thing))}"
    except (OSError, TypeError):
        return name


def hash_text(text: str) -> str:
    """A short, stable hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
