"""The second derivatives and label distributions of losses in the output: closed forms, and autodiff for any other.

Source: J. Martens, New insights and perspectives on the natural gradient method, JMLR 2020, sections 8 and 9.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jvp, vmap

from refluence.batches import Batch
from refluence.errors import NonFiniteError, TaskError
from refluence.task import IGNORE_INDEX, LOSSES, Task, batch_targets

MAX_CHUNK_ELEMENTS = 1 << 24
ROUNDING = 32
MOVED = 2.0**-10


class IndefiniteLossError(TaskError):
    """A loss whose Hessian in the model's output has a negative eigenvalue, so that its GGN has no real root."""

    def __init__(self, message: str, row: int, eigenvalue: float) -> None:
        super().__init__(message)
        self.row, self.eigenvalue = row, eigenvalue


class Form(ABC):
    """What is known of a loss in the output."""

    @abstractmethod
    def roots(self, output: Tensor, batch: Batch, start: int) -> Tensor:
        """(n, q, *out)."""

    @abstractmethod
    def products(self, output: Tensor, batch: Batch, tangents: Tensor) -> Tensor:
        """(k, n, *out)."""


class Distribution(Form):
    """A loss that is −log of a density of the labels given the output."""

    @abstractmethod
    def fisher_roots(self, output: Tensor, batch: Batch) -> Tensor:
        """(n, q, *out)."""

    @abstractmethod
    def fisher_shares(self, output: Tensor, batch: Batch) -> Tensor:
        """(n,): the true Fisher over the Hessian of each example's loss."""

    @abstractmethod
    def labels(self, output: Tensor) -> int:
        """The number of labels of an example."""

    @abstractmethod
    def sampled(self, output: Tensor, batch: Batch, uniforms: Tensor) -> Tensor:
        """∂ℓ/∂out (n, samples, *out) at the labels that uniform numbers (n, samples, labels) stand for."""


class _CrossEntropy(Distribution):
    def roots(self, output: Tensor, batch: Batch, start: int) -> Tensor:
        return self._scaled_roots(output, self._shares(output, batch).sqrt())

    def fisher_roots(self, output: Tensor, batch: Batch) -> Tensor:
        return self._scaled_roots(output, self._shares(output, batch))

    def fisher_shares(self, output: Tensor, batch: Batch) -> Tensor:
        return self._shares(output, batch).amax(dim=1)

    def labels(self, output: Tensor) -> int:
        return output.shape[1:-1].numel()

    def sampled(self, output: Tensor, batch: Batch, uniforms: Tensor) -> Tensor:
        p = self._probabilities(output)
        cumulative = p.double().cumsum(dim=-1)
        # Divided by its own end, so that it reaches 1 at a class with p > 0 and no number lies beyond.
        cumulative /= cumulative[..., -1:].clone()
        labels = torch.searchsorted(cumulative, uniforms.transpose(1, 2).contiguous(), right=True)
        labels.clamp_(max=p.shape[-1] - 1)  # Among NaN none is found; the gradient stays NaN.
        gradients = p[:, None].repeat(1, uniforms.shape[1], 1, 1)
        minus_one = -torch.ones((), dtype=p.dtype, device=p.device)
        gradients.scatter_add_(-1, labels.transpose(1, 2)[..., None], minus_one.expand(*uniforms.shape, 1))
        gradients *= self._shares(output, batch)[:, None, :, None]
        return gradients.reshape(*uniforms.shape[:2], *output.shape[1:])

    def products(self, output: Tensor, batch: Batch, tangents: Tensor) -> Tensor:
        p = self._probabilities(output)
        u = tangents.reshape(-1, *p.shape)
        found = p * (u - (p * u).sum(dim=-1, keepdim=True)) * self._shares(output, batch)[..., None]
        return found.reshape(tangents.shape)

    def _scaled_roots(self, output: Tensor, scales: Float[Tensor, "n t"]) -> Tensor:
        p = self._probabilities(output)
        n, t, c = p.shape
        lengths = p.sqrt() * scales[..., None]
        columns = (torch.eye(c, dtype=p.dtype, device=p.device) - p[:, :, None]) * lengths[..., None]
        roots = p.new_zeros(n, t, c, t, c)
        every = torch.arange(t, device=p.device)
        roots[:, every, :, every, :] = columns.transpose(0, 1)
        return roots.reshape(n, t * c, *output.shape[1:])

    @staticmethod
    def _probabilities(output: Tensor) -> Float[Tensor, "n t c"]:
        return torch.softmax(output.reshape(output.shape[0], output.shape[1:-1].numel(), output.shape[-1]), dim=-1)

    @staticmethod
    def _shares(output: Tensor, batch: Batch) -> Float[Tensor, "n t"]:
        """1/T_i for the targets that count, else 0."""
        counts = batch_targets(batch).reshape(output.shape[0], output.shape[1:-1].numel()) != IGNORE_INDEX
        return counts.to(output.dtype) / counts.sum(dim=1, keepdim=True).clamp(min=1)


class _Elementwise(Distribution):
    """A mean over the outputs of one loss each: a diagonal Hessian."""

    @abstractmethod
    def curvature(self, output: Tensor) -> Tensor:
        """The second derivative of one output's loss."""

    def roots(self, output: Tensor, batch: Batch, start: int) -> Tensor:
        o = output.shape[1:].numel()
        return self._diagonal((self.curvature(output) / o).sqrt())

    def products(self, output: Tensor, batch: Batch, tangents: Tensor) -> Tensor:
        return tangents * (self.curvature(output) / output.shape[1:].numel())

    def labels(self, output: Tensor) -> int:
        return output.shape[1:].numel()

    @staticmethod
    def _diagonal(values: Float[Tensor, "n *out"]) -> Float[Tensor, "n q *out"]:
        n, o = values.shape[0], values.shape[1:].numel()
        return torch.diag_embed(values.reshape(n, o)).reshape(n, o, *values.shape[1:])


class _MeanSquare(_Elementwise):
    def curvature(self, output: Tensor) -> Tensor:
        return torch.full_like(output, 2.0)

    def fisher_roots(self, output: Tensor, batch: Batch) -> Tensor:
        return self.roots(output, batch, 0)

    def fisher_shares(self, output: Tensor, batch: Batch) -> Tensor:
        return output.new_ones(output.shape[0])

    def sampled(self, output: Tensor, batch: Batch, uniforms: Tensor) -> Tensor:
        noise = torch.special.ndtri(uniforms).to(output.dtype) * (2 / output.shape[1:].numel()) ** 0.5
        return noise.reshape(*uniforms.shape[:2], *output.shape[1:])


class _BinaryCrossEntropy(_Elementwise):
    def curvature(self, output: Tensor) -> Tensor:
        return output.sigmoid() * (-output).sigmoid()

    def fisher_roots(self, output: Tensor, batch: Batch) -> Tensor:
        return self._diagonal(self.curvature(output).sqrt() / output.shape[1:].numel())

    def fisher_shares(self, output: Tensor, batch: Batch) -> Tensor:
        return output.new_full((output.shape[0],), 1 / output.shape[1:].numel())

    def sampled(self, output: Tensor, batch: Batch, uniforms: Tensor) -> Tensor:
        n, samples, o = uniforms.shape
        logits = output.reshape(n, 1, o)
        ones = uniforms < logits.double().sigmoid()
        return (torch.where(ones, -(-logits).sigmoid(), logits.sigmoid()) / o).reshape(n, samples, *output.shape[1:])


class _AnyLoss(Form):
    """A loss given as a function, by autodiff; its examples are independent, so one pass serves all of them."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def roots(self, output: Tensor, batch: Batch, start: int) -> Tensor:
        n, o = output.shape[0], output.shape[1:].numel()
        units = torch.eye(o, dtype=output.dtype, device=output.device).reshape(o, 1, *output.shape[1:])
        columns = self.products(output, batch, units.expand(o, *output.shape)).reshape(o, n, o)
        hessians = (columns.transpose(0, 1) + columns.permute(1, 2, 0)).double() / 2
        finite = hessians.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            row = start + int((~finite).nonzero()[0])
            raise NonFiniteError(
                f"the Hessian of the loss in the output has NaN or Inf at row {row}: look at that example, or use a "
                "loss that has a second derivative there",
                row,
                "the Hessian of the loss in the output has NaN or Inf",
            )
        values, vectors = torch.linalg.eigh(hessians)
        self._check_positive(values, torch.finfo(output.dtype).eps, start)
        roots = (vectors * values.clamp(min=0).sqrt()[:, None]).transpose(1, 2)
        return roots.to(output.dtype).reshape(n, o, *output.shape[1:])

    def products(self, output: Tensor, batch: Batch, tangents: Tensor) -> Tensor:
        def total(values: Tensor) -> Tensor:
            # A clone, because a loss may write into what it is given.
            return self.task.losses(values.clone(), batch).sum()

        def product(tangent: Tensor) -> Tensor:
            return jvp(grad(total), (output,), (tangent,))[1]

        tangents = tangents.to(output.dtype)
        if not tangents.numel():
            return torch.zeros_like(tangents)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                return vmap(product, chunk_size=max(1, MAX_CHUNK_ELEMENTS // output.numel()))(tangents)
        except RuntimeError:
            # An operation without a forward derivative or a batching rule.
            return self._by_double_backward(output, total, tangents)

    def _by_double_backward(self, output: Tensor, total: Callable[[Tensor], Tensor], tangents: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = output.clone().requires_grad_()
            value = total(leaf)
            products = torch.zeros_like(tangents)
            try:
                slope = torch.autograd.grad(value, leaf, create_graph=True)[0]
                if not slope.requires_grad:
                    self._check_constant(slope, output, total)
                for product, tangent in zip(products, tangents, strict=True):
                    if slope.requires_grad:
                        product.copy_(torch.autograd.grad(slope, leaf, tangent, retain_graph=True)[0])
            except RuntimeError as error:
                raise TaskError(
                    f"the loss {_name(self.task)} cannot be differentiated twice in the output ({error}): use the "
                    'curvature "fisher", which needs its gradient only, or write it with operations that can'
                ) from error
        return products

    @staticmethod
    def _check_constant(slope: Tensor, output: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        """A backward pass of the user's own may leave no graph though its gradient changes with the output."""
        moved = (output * (1 + MOVED) + MOVED).requires_grad_()
        if not torch.allclose(torch.autograd.grad(total(moved), moved)[0], slope):
            raise RuntimeError("its gradient changes with the output, and its backward pass leaves no graph")

    def _check_positive(self, values: Float[Tensor, "n o"], eps: float, start: int) -> None:
        if not values.numel():
            return
        # Entries of a saturated example cancel: their rounding has the scale of the whole loss, taken as at least 1.
        allowed = ROUNDING * values.shape[1] * eps * max(1.0, float(values.abs().max()))
        row = int(values[:, 0].argmin())
        smallest = float(values[row, 0])
        if smallest < -allowed:
            raise IndefiniteLossError(
                f"the Hessian of the loss in the output has the eigenvalue {smallest:.3g} at row {start + row}, so its "
                'GGN is not positive semi-definite: use the curvature "hessian" or "fisher", or a loss that is convex '
                "in the output",
                start + row,
                smallest,
            )


_DISTRIBUTIONS: dict[str, Distribution] = {
    "cross_entropy": _CrossEntropy(),
    "mse": _MeanSquare(),
    "binary_cross_entropy": _BinaryCrossEntropy(),
}


def form_of(task: Task) -> Form:
    """What is known of a task's loss; a function that is one of the built-in ones has their closed form."""
    names = [name for name, function in LOSSES.items() if task.loss == name or task.loss is function]
    return _DISTRIBUTIONS[names[0]] if names else _AnyLoss(task)


def distribution_of(task: Task) -> Distribution:
    """The distribution of labels that a task's loss defines.

    Raises:
        TaskError: a loss that defines none.
    """
    form = form_of(task)
    if isinstance(form, Distribution):
        return form
    raise TaskError(
        f'the loss {_name(task)} defines no distribution of labels, so it has no true Fisher: use the curvature "ggn" '
        f'(any loss) or "fisher", or one of the losses {sorted(LOSSES)}'
    )


def _name(task: Task) -> str:
    return getattr(task.loss, "__qualname__", type(task.loss).__qualname__)
