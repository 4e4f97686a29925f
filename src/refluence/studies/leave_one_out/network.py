"""The network of the figure's convolutional panel: its data, its training, and its objective held where it is.

Axis letters: m parameter vectors, d parameters, n examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float64
from torch import Tensor, nn

from refluence.evaluation.sums import Gradient, Sums, Value, flat_parameters
from refluence.progress import track
from refluence.studies.folder import StudyFolder
from refluence.training.recipe import stream
from refluence.zoo import load_dataset
from refluence.zoo.models import AllCnn

BATCH, CHUNK, WARMUP = 500, 2_000, 1_000
LEARNING_RATE, LAST_RATE = 5e-3, 1e-6
ROWS = 1_100
VALIDATION = 5_000


@dataclass(frozen=True)
class ConvolutionalOptions:
    """The panel's setting.

    Args:
        n: train images, drawn from the last 55,000 of MNIST; the paper has a tenth of them.
        steps: of Adam on batches of 500; the paper has 500,000.
        l2: of all parameters.
        damping: λ of the prediction and of the refits.
        test: test row; the paper's.
        top: examples of largest |influence| that are removed, each alone.
        seed: of the images, the initialisation and the batches.
    """

    n: int = 5_500
    steps: int = 30_000
    l2: float = 1e-3
    damping: float = 1e-2
    test: int = 6_558
    top: int = 100
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Images:
    """Pixels in 0…1 and labels; `rows` are rows of MNIST's train set."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    rows: Tensor


def load_images(options: ConvolutionalOptions) -> Images:
    """The data of the panel.

    Raises:
        DataError: MNIST is not on this machine.
    """
    data = load_dataset("mnist", n_train=60_000, n_test=10_000)
    image = data.image
    assert image is not None
    x, test = (((part * image.std + image.mean) * 255).round() / 255 for part in (data.train[0], data.test[0]))
    generator = torch.Generator().manual_seed(options.seed)
    rows = VALIDATION + torch.randperm(len(x) - VALIDATION, generator=generator)[: options.n]
    return Images((_laid_out(x[rows]), data.train[1][rows]), (_laid_out(test), data.test[1]), rows)


def _laid_out(images: Tensor) -> Tensor:
    """Channels last in memory, in which convolutions of few channels take half the time."""
    return images.contiguous(memory_format=torch.channels_last)


def untrained(options: ConvolutionalOptions) -> AllCnn:
    """The network as it starts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(options.seed, "initialisation"))
        return AllCnn(1, 10).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def trained(folder: StudyFolder, images: Images, options: ConvolutionalOptions, progress: bool) -> AllCnn:
    """The network after all steps; every 2,000 of them are kept, so that an interrupted training goes on."""
    model = untrained(options)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters)
    starts = range(0, options.steps, CHUNK)
    for first in track(starts, "training the network", enabled=progress):
        name = f"training/{first + CHUNK}"

        def work(first: int = first) -> tuple[dict[str, Tensor], dict[str, float]]:
            return _steps(model, optimizer, images, options, first), {}

        _restore(model, optimizer, folder.stage(name, work).tensors)
    return model.eval()  # type: ignore[return-value]


def _steps(
    model: nn.Module, optimizer: torch.optim.Adam, images: Images, options: ConvolutionalOptions, first: int
) -> dict[str, Tensor]:
    x, y = images.train
    parameters = list(model.parameters())
    last = min(first + CHUNK, options.steps)
    for step, rows in _batches(options, first, last):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, options.steps)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss = loss + options.l2 / 2 * torch.stack([p.square().sum() for p in parameters]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    kept = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for i, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        kept |= {f"adam/{i}/{key}": torch.as_tensor(state[key]) for key in ("step", "exp_avg", "exp_avg_sq")}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in kept.items()}


def _restore(model: nn.Module, optimizer: torch.optim.Adam, tensors: Mapping[str, Tensor]) -> None:
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    for i, parameter in enumerate(model.parameters()):
        optimizer.state[parameter] = {
            key: tensors[f"adam/{i}/{key}"].clone(memory_format=torch.preserve_format)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }


def _batches(options: ConvolutionalOptions, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
    """(step, its rows): every epoch has an order of its own, which depends on the seed and on the epoch alone."""
    length = -(-options.n // BATCH)
    for epoch in range(first // length, -(-last // length)):
        generator = torch.Generator().manual_seed(stream(options.seed, f"epoch {epoch}"))
        for i, rows in enumerate(torch.randperm(options.n, generator=generator).split(BATCH)):
            if first <= (step := epoch * length + i) < last:
                yield step, rows


def _rate(step: int, steps: int) -> float:
    rise = min(1.0, (step + 1) / WARMUP)
    return LEARNING_RATE * rise * (1 + math.cos(math.pi * step / steps)) / 2 + LAST_RATE


class HeldLosses(Sums):
    """Σ_j ℓ_j(θ) − n⟨h, θ⟩ + n(λ/2)‖θ − θ̂‖², h = ∇[(1/n)Σℓ + (l2/2)‖·‖²](θ̂), in float32 with sums in float64.

    With (l2/2)‖θ‖² beside it θ̂ is a stationary point wherever the training stopped, and the Hessian there is that of
    the training objective plus λ: the problem whose first-order answer the damped influence is. Over sets of examples
    the losses are the plain ones.
    """

    rounding = 1e-7

    def __init__(self, model: nn.Module, train: tuple[Tensor, Tensor], l2: float, damping: float) -> None:
        self.model, self.train, self.damping = model, train, damping
        self.parameters = list(model.parameters())
        self.names = [name for name, _ in model.named_parameters()]
        self.start = flat_parameters(model, self.names)
        self.n, self.d = len(train[1]), len(self.start)
        self.l2 = l2

    @cached_property
    def _held(self) -> Float64[Tensor, " d"]:
        return self._losses(self.start, *self.train)[1] / self.n + self.l2 * self.start

    def of_all(self, thetas: Float64[Tensor, "m d"]) -> tuple[Value, Gradient]:
        """The held losses of all examples."""
        found = []
        for theta in thetas:
            value, gradient = self._losses(theta, *self.train)
            moved = theta - self.start
            straight = self._held @ theta - self.damping / 2 * moved @ moved
            found.append((value - self.n * straight, gradient - self.n * (self._held - self.damping * moved)))
        return torch.stack([value for value, _ in found]), torch.stack([gradient for _, gradient in found])

    def of_sets(self, thetas: Float64[Tensor, "m d"], sets: Sequence[Sequence[int]]) -> tuple[Value, Gradient]:
        """The losses of the examples that are left out."""
        x, y = self.train
        found = [
            self._losses(theta, x[list(rows)], y[list(rows)]) if len(rows) else (theta.new_zeros(()), 0 * theta)
            for theta, rows in zip(thetas, sets, strict=True)
        ]
        return torch.stack([value for value, _ in found]), torch.stack([gradient for _, gradient in found])

    def together(self, memory: int, copies: int) -> int:
        """One: convolutions of many models are slower than one after the other on a CPU."""
        return 1

    def losses_at(self, theta: Float64[Tensor, " d"], data: tuple[Tensor, Tensor]) -> Float64[Tensor, " k"]:
        """The losses of examples."""
        self._put(theta)
        with torch.no_grad():
            return F.cross_entropy(self.model(data[0]).double(), data[1], reduction="none")

    def _put(self, theta: Float64[Tensor, " d"]) -> None:
        with torch.no_grad():
            pieces = theta.split([parameter.numel() for parameter in self.parameters])
            for parameter, piece in zip(self.parameters, pieces, strict=True):
                parameter.copy_(piece.view(parameter.shape))

    def _losses(
        self, theta: Float64[Tensor, " d"], x: Tensor, y: Tensor
    ) -> tuple[Float64[Tensor, ""], Float64[Tensor, " d"]]:
        self._put(theta)
        value, gradient = theta.new_zeros(()), torch.zeros_like(theta)
        with torch.enable_grad():
            for inputs, labels in zip(x.split(ROWS), y.split(ROWS), strict=True):
                total = F.cross_entropy(self.model(inputs), labels, reduction="none").double().sum()
                parts = torch.autograd.grad(total, self.parameters)
                value += total.detach()
                gradient += torch.cat([part.reshape(-1) for part in parts]).double()
        return value, gradient
